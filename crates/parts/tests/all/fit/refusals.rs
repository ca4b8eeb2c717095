//! Specs that do not fit.

use super::{Given, Subject, WIDTH, block, spec, tokens};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::organisation::fit::{
    FitOutput, FitSpec, GroupPositions, LatentPositions, Tiles,
};
use lapidary_parts::organisation::{OrganisationSpec, Surroundings};
use lapidary_signal::{Signal, Trace};

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut FitSpec, &mut Vec<BlockSpec>), expected: &str| {
        let mut spec = spec("(1)1(1)", 3, false);
        let mut blocks = vec![block(12, 4, false); 2];
        change(&mut spec, &mut blocks);
        let model = Surroundings {
            blocks: &blocks,
            width: WIDTH,
            length: 12,
        };
        let spec = OrganisationSpec::Interleaved(spec);
        let said = spec
            .validate(&model, "organisation")
            .unwrap_err()
            .to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    refused(
        &|spec, _| spec.layout = "(1)(1)".to_owned(),
        "organisation.layout is",
    );
    refused(
        &|spec, _| spec.layout = "(1)1(2)".to_owned(),
        "organisation.layout is",
    );
    refused(&|spec, _| spec.group = 0, "organisation.group is 0");
    refused(
        &|spec, _| spec.groups = 2,
        "organisation.groups is 2, but must be at least 3",
    );
    refused(&|spec, _| spec.latents = 0, "organisation.latents is 0");
    refused(
        &|spec, _| spec.block = None,
        "organisation.block is \"absent\"",
    );
    refused(
        &|spec, _| spec.exchange_heads = Some(3),
        "organisation.exchange_heads is 3",
    );
    refused(
        &|spec, _| spec.output = FitOutput::Latents,
        "organisation.output is",
    );
    refused(
        &|_, blocks| blocks[1] = block(12, 4, true),
        "blocks.0.attention is",
    );
    refused(
        &|_, blocks| *blocks = vec![block(12, 4, true); 2],
        "organisation.block.attention.causal is false",
    );
    refused(
        &|_, blocks| blocks[0].cross_attention = Some(MultiHeadSpec::new(2)),
        "blocks.0.cross_attention is",
    );
    refused(
        &|spec, _| {
            spec.tiles = Some(Tiles {
                columns: 5,
                height: 2,
                width: 2,
            });
        },
        "organisation.tiles.columns is 5",
    );
    refused(
        &|spec, _| {
            spec.group = 3;
            spec.groups = 4;
            spec.positions = GroupPositions::Grid;
        },
        "organisation.group is 3",
    );
    refused(
        &|spec, _| {
            if let Some(block) = &mut spec.block {
                block.repeat = 2;
            }
        },
        "organisation.block.repeat is 2",
    );
    // Without global layers there is nothing that latents are for.
    let locals = |spec: &mut FitSpec| {
        spec.layout = "(2)".to_owned();
        spec.latents = 0;
    };
    refused(
        &|spec, _| {
            locals(spec);
            spec.latents = 2;
        },
        "organisation.latents is 2, but must be 0",
    );
    refused(
        &|spec, _| locals(spec),
        "organisation.block is \"given\", but must be absent",
    );
    refused(
        &|spec, _| {
            locals(spec);
            spec.block = None;
            spec.exchange_heads = Some(2);
        },
        "organisation.exchange_heads is \"given\", but must be absent",
    );
    refused(
        &|spec, _| {
            locals(spec);
            spec.block = None;
            spec.width = Some(12);
        },
        "organisation.width is \"given\", but must be absent",
    );
    refused(
        &|spec, _| {
            locals(spec);
            spec.block = None;
            spec.width = None;
            spec.latent_positions = LatentPositions::Sinusoidal;
        },
        "organisation.latent_positions is \"given\", but must be absent",
    );
    let long = Subject::new(spec("(1)1(1)", 3, false), false);
    let x = Signal::from(tokens(13));
    let said = long.signal(&long.map, x, Given::default(), &Trace::new());
    assert!(
        said.unwrap_err()
            .to_string()
            .starts_with("number of tokens is 13")
    );
}
