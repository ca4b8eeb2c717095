//! `lapidary spec`: what a model is, as data.

use crate::cli::{Global, Spec};
use crate::commands::explain::Explained;
use crate::{loading, output};
use anyhow::Result;
use lapidary_model::ModelSpec;
use serde_json::{Map, Value};

pub fn run(arguments: &Spec, global: &Global) -> Result<()> {
    if arguments.explanation {
        return output::print_json(&schemars::schema_for!(Explained));
    }
    let Some(model) = &arguments.model else {
        return output::print_json(&schemars::schema_for!(ModelSpec));
    };
    let package = loading::package(model, global)?;
    if let Ok(model) = package.single_model() {
        if global.json {
            return output::print_json(model.spec());
        }
        return output::print(&toml::to_string(model.spec())?);
    }
    let mut towers = Map::new();
    for tower in &package.towers {
        towers.insert(
            tower.name.clone(),
            serde_json::to_value(tower.model.spec())?,
        );
    }
    output::print_json(&Value::Object(towers))
}
