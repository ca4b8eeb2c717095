//! `lapidary reproduce`: a system's claims, published and measured.

use std::path::Path;
use std::time::Instant;

use crate::cli::{self, Global, Reproduce};
use crate::output;
use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};
use lapidary_lab::{Progress, Reproduction, Scale, Setting, System, Verdict, find, systems};

pub fn run(arguments: &Reproduce, global: &Global) -> Result<()> {
    if arguments.list {
        return list(global);
    }
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
        let reproduction = system.reproduce(&Setting {
            progress: on_standard_error(system.slug),
            ..setting.clone()
        })?;
        write(&arguments.out, &reproduction)?;
        if !global.json {
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
            eprintln!("JSON and plots are in {}", arguments.out.display());
            Ok(())
        }
    }
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
            verdict(claim.verdict),
            &claim.note,
        ]);
    }
    format!(
        "{}\n{} · {:.1} s\n{table}\n",
        reproduction.title, reproduction.setting, reproduction.seconds
    )
}

fn markdown(reproductions: &[Reproduction]) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let mut text = "# Reproductions\n\nMade by `lapidary reproduce --all`. A claim that does not hold is shown as such.\n".to_owned();
    for reproduction in reproductions {
        text += &format!(
            "\n## {} (`{}`)\n\n{}. At {} scale, seed {}, {:.1} s.\n\n| claim | published | measured here | holds? | note |\n|---|---|---|---|---|\n",
            reproduction.title,
            reproduction.slug,
            reproduction.setting,
            format!("{:?}", reproduction.scale).to_lowercase(),
            reproduction.seed,
            reproduction.seconds,
        );
        for claim in &reproduction.claims {
            text += &format!(
                "| {} | {} | {} | {} | {} |\n",
                cell(&claim.claim),
                cell(&claim.published),
                cell(&claim.measured),
                verdict(claim.verdict),
                cell(&claim.note)
            );
        }
    }
    text
}
