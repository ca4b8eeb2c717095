//! Options that nothing in a run would hear: refused before it begins, since what is passed over in silence
//! is taken for done.

use anyhow::{Result, bail, ensure};
use lapidary_compress::automatic::AutomaticSettings;
use lapidary_compress::{Effect, Method, Recipe, Settings, Stage};

use crate::cli::Compress;

/// Refuses options about healing and about the search of a run that does neither. The command line asks for
/// `--heal` and `--auto` beside them, but not where those two are excluded by something else.
pub(super) fn check(arguments: &Compress) -> Result<()> {
    let of_healing = [
        ("--heal-rate", arguments.heal_rate != 1e-4),
        ("--distil", arguments.distil != 0.0),
        ("--hints", arguments.hints != 0.0),
        ("--regrow", arguments.regrow != 0.0),
        ("--adapters", arguments.adapters.is_some()),
        ("--heal-rounded", arguments.heal_rounded),
    ];
    let of_adapters = [
        ("--adapter-alpha", arguments.adapter_alpha != 16.0),
        ("--adapter-dropout", arguments.adapter_dropout != 0.0),
        ("--adapter-layers", arguments.adapter_layers.is_some()),
    ];
    let of_searching = [
        ("--budget", arguments.budget.is_some()),
        ("--evaluations", arguments.evaluations != 60),
        ("--mix", arguments.mix != AutomaticSettings::METHODS),
        ("--state", arguments.state.is_some()),
    ];
    for (needed, there, options) in [
        ("--heal STEPS", arguments.heal.is_some(), &of_healing[..]),
        (
            "--adapters RANK",
            arguments.adapters.is_some(),
            &of_adapters[..],
        ),
        ("--auto", arguments.auto, &of_searching[..]),
    ] {
        if there {
            continue;
        }
        if let Some((name, _)) = options.iter().find(|(_, given)| *given) {
            bail!("{name} is given without {needed}, which it is about");
        }
    }
    Ok(())
}

/// As [`check_methods`] of a recipe's stages.
pub(super) fn check_stages(
    recipe: &Recipe,
    arguments: &Compress,
    settings: &Settings,
) -> Result<()> {
    let methods = recipe.stages.iter().map(Stage::method);
    let methods = methods.collect::<lapidary_compress::Result<Vec<_>>>()?;
    check_methods(&methods, arguments, settings.activations.range.is_some())
}

/// Refuses options that none of these methods hears, nor the measuring of rounded activations where there is
/// one.
pub(super) fn check_methods(
    methods: &[&Method],
    arguments: &Compress,
    rounded: bool,
) -> Result<()> {
    let named = names(methods);
    ensure!(
        arguments.ratio.is_none() || methods.iter().any(|method| !method.rounds()),
        "--ratio is for methods that take something away, but the method is {named}"
    );
    for text in &arguments.set {
        let section = text.split(['=', '.']).next().unwrap_or_default().trim();
        let by_measure = ["activations", "quantise", "selection"].contains(&section);
        ensure!(
            rounded && by_measure || methods.iter().any(|method| method.reads(section)),
            "--set {text} is not for {named}, which does not read `{section}`{}",
            match section {
                "activations" => ": it is for --activations",
                _ => "",
            }
        );
    }
    ensure!(
        arguments.pattern.is_none()
            || methods
                .iter()
                .any(|method| method.effect == Effect::Weights),
        "--pattern is for methods that set weights to zero, such as magnitude, but the method is {named}"
    );
    ensure!(
        arguments.layers.is_none()
            || rounded
            || methods.iter().any(|method| method.chooses_layers()),
        "--layers is for methods that take layers one by one (factorisations, rounding, pruning, \
         curvature), but the method is {named}"
    );
    let uniform = match arguments.uniform_heads {
        true => Some("--uniform-heads"),
        false => arguments.uniform.then_some("--uniform"),
    };
    if let Some(option) = uniform {
        ensure!(
            methods
                .iter()
                .any(|method| ["modegpt", "lorap"].contains(&method.name)),
            "{option} is for modegpt and lorap, but the method is {named}"
        );
    }
    Ok(())
}

fn names(methods: &[&Method]) -> String {
    let names: Vec<&str> = methods.iter().map(|method| method.name).collect();
    names.join("+")
}
