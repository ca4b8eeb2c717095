//! `lapidary reproduce`: a system's claims, published and measured.

use std::path::Path;
use std::time::Instant;

use crate::cli::{self, Global, Reproduce};
use crate::output;
use anyhow::{Context, Result, ensure};
use comfy_table::{ContentArrangement, Table, presets};
use lapidary_lab::{Claim, Progress, Reproduction, Scale, Setting, System, Verdict, find, systems};

pub fn run(arguments: &Reproduce, global: &Global) -> Result<()> {
    if arguments.list {
        return list(global);
    }
    ensure!(
        !(arguments.markdown && global.json),
        "--markdown and --json cannot both be printed: ask for one of them"
    );
    let seeds = seeds(global.seed, arguments.seeds)?;
    let setting = Setting {
        scale: match arguments.scale {
            cli::Scale::Smoke => Scale::Smoke,
            cli::Scale::Small => Scale::Small,
            cli::Scale::Full => Scale::Full,
        },
        seed: global.seed,
        data: arguments.data.clone(),
        models: arguments.models.clone(),
        progress: Progress::default(),
    };
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("{} cannot be made", arguments.out.display()))?;
    let chosen: Vec<&System> = match &arguments.slug {
        Some(slug) => vec![find(slug)?],
        None => systems().iter().collect(),
    };
    let mut done = Vec::new();
    for system in chosen {
        let setting = Setting {
            progress: on_standard_error(system.slug),
            ..setting.clone()
        };
        let reproduction = system.reproduce_with_seeds(&setting, &seeds)?;
        write(&arguments.out, &reproduction)?;
        if arguments.markdown {
            output::print(&section(&reproduction))?;
        } else if !global.json {
            output::print(&in_terminal(&reproduction))?;
        }
        done.push(reproduction);
    }
    if arguments.all {
        output::write_text(&arguments.out.join("REPRODUCTIONS.md"), &markdown(&done))?;
    }
    match (global.json, done.as_slice()) {
        (true, [only]) => output::print_json(only),
        (true, several) => output::print_json(&several),
        (false, _) => {
            let whose = match seeds.as_slice() {
                [first, _, ..] => format!(" (of seed {first})"),
                _ => String::new(),
            };
            eprintln!("JSON and plots{whose} are in {}", arguments.out.display());
            Ok(())
        }
    }
}

/// `count` seeds from `first` on.
fn seeds(first: u64, count: u64) -> Result<Vec<u64>> {
    let last = first.checked_add(count.saturating_sub(1));
    let last = last.with_context(|| {
        format!(
            "there are no {count} seeds from --seed {first} on: the largest is {}",
            u64::MAX
        )
    })?;
    Ok((first..=last).collect())
}

/// Lines with the time since the experiment's start.
fn on_standard_error(slug: &'static str) -> Progress {
    let started = Instant::now();
    eprintln!("{slug} …");
    Progress::to(move |what| {
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{seconds:7.1} s  {slug}: {what}");
    })
}

fn list(global: &Global) -> Result<()> {
    if global.json {
        return output::print_json(&systems());
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["slug", "year", "arXiv", "title"]);
    for system in systems() {
        let year = system.year.to_string();
        table.add_row([
            system.slug,
            &year,
            system.arxiv.unwrap_or("–"),
            system.title,
        ]);
    }
    output::print(&format!("{table}\n"))
}

fn write(directory: &Path, reproduction: &Reproduction) -> Result<()> {
    let stem = format!(
        "{}-{}",
        reproduction.slug,
        format!("{:?}", reproduction.scale).to_lowercase()
    );
    let json = serde_json::to_string_pretty(reproduction)? + "\n";
    output::write_text(&directory.join(format!("{stem}.json")), &json)?;
    for (index, plot) in reproduction.plots.iter().enumerate() {
        let file = directory.join(format!("{stem}-{}.svg", index + 1));
        output::write_text(&file, &plot.to_svg()?)?;
    }
    Ok(())
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Holds => "holds",
        Verdict::DoesNotHold => "DOES NOT HOLD",
        Verdict::NotMeasured => "not measured",
    }
}

/// The verdict, and in how many of several seeds the claim holds.
fn holding(claim: &Claim) -> String {
    let told = match (claim.verdict, claim.tally()) {
        (Verdict::NotMeasured, _) | (_, None) => return verdict(claim.verdict).to_owned(),
        (_, Some(tally)) => tally,
    };
    let mut text = match claim.verdict {
        Verdict::DoesNotHold => format!("{}: ", verdict(claim.verdict)),
        _ => String::new(),
    };
    text += &format!("holds in {} of {}", told.holds, told.measured);
    if told.measured < told.seeds {
        text += &format!(", not measured in {}", told.seeds - told.measured);
    }
    text
}

/// How numbers of several seeds are to be read, where some may have been put together.
fn reading(reproduction: &Reproduction) -> &'static str {
    match reproduction.seeds.len() {
        ..3 => "",
        _ => "Of numbers that differ between seeds: median [least, most].",
    }
}

fn in_terminal(reproduction: &Reproduction) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["claim", "published", "measured here", "holds?", "note"]);
    for claim in &reproduction.claims {
        table.add_row([
            claim.claim.as_str(),
            &claim.published,
            &claim.measured,
            &holding(claim),
            &claim.note,
        ]);
    }
    let mut setting = reproduction.setting.clone();
    if reproduction.seeds.len() > 1 {
        setting += &format!(" · {}", reproduction.named_seeds());
    }
    let mut heading = format!(
        "{}\n{setting} · {:.1} s\n",
        reproduction.title, reproduction.seconds
    );
    let reading = reading(reproduction);
    if !reading.is_empty() {
        heading += &format!("{reading}\n");
    }
    format!("{heading}{table}\n")
}

/// REPRODUCTIONS.md as a whole.
fn markdown(reproductions: &[Reproduction]) -> String {
    let mut text = "# Reproductions\n\nMade by `lapidary reproduce --all`. A claim that does not hold is shown as such.\n".to_owned();
    for reproduction in reproductions {
        text += &format!("\n{}", section(reproduction));
    }
    text
}

/// One system's section of REPRODUCTIONS.md.
fn section(reproduction: &Reproduction) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let reading = match reading(reproduction) {
        "" => String::new(),
        told => format!(" {told}"),
    };
    let mut text = format!(
        "## {} (`{}`)\n\n{}. At {} scale, {}, {:.1} s.{reading}\n\n| claim | published | measured here | holds? | note |\n|---|---|---|---|---|\n",
        reproduction.title,
        reproduction.slug,
        reproduction.setting,
        format!("{:?}", reproduction.scale).to_lowercase(),
        reproduction.named_seeds(),
        reproduction.seconds,
    );
    for claim in &reproduction.claims {
        text += &format!(
            "| {} | {} | {} | {} | {} |\n",
            cell(&claim.claim),
            cell(&claim.published),
            cell(&claim.measured),
            holding(claim),
            cell(&claim.note)
        );
    }
    text
}
