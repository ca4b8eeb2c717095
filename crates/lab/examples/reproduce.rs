//! Runs one system's experiment and prints its claims:
//! `cargo run --release --example reproduce -- decompx small 0 [DATA]`.

use lapidary_lab::{Progress, Scale, Setting, find};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let slug = arguments.next().ok_or("a system's name is missing")?;
    let scale = match arguments.next().as_deref() {
        None | Some("smoke") => Scale::Smoke,
        Some("small") => Scale::Small,
        Some("full") => Scale::Full,
        Some(other) => return Err(format!("scale {other:?}: smoke, small or full").into()),
    };
    let seed = arguments.next().map_or(Ok(0), |seed| seed.parse())?;
    let data = arguments.next().map(Into::into);
    let found = find(&slug)?.reproduce(&Setting {
        scale,
        seed,
        data,
        progress: Progress::to(|what| eprintln!("{what}")),
        ..Setting::default()
    })?;
    println!(
        "{} ({scale:?}, seed {seed}, {:.0} s)\n{}\n",
        slug, found.seconds, found.setting
    );
    println!("| claim | published | measured | verdict | note |\n|---|---|---|---|---|");
    for claim in &found.claims {
        let (verdict, note) = (claim.verdict, &claim.note);
        println!(
            "| {} | {} | {} | {verdict:?} | {note} |",
            claim.claim, claim.published, claim.measured
        );
    }
    Ok(())
}
