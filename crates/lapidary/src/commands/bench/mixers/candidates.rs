//! What `lapidary bench mixers` compares: each row, how far it goes, and the dense row of its kind.

use lapidary_lab::mechanisms::{Mechanism, mechanisms};
use lapidary_parts::attention::mechanism::doubly_stochastic::{
    CircuitSpec, DoublyStochasticSpec, Operator,
};
use lapidary_parts::attention::{MechanismSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::organisation::fit::{FitOutput, FitSpec, GroupPositions, LatentPositions};
use lapidary_parts::organisation::vcc::VccSpec;
use lapidary_parts::organisation::{OrganisationSpec, Surroundings};
use lapidary_parts::position::{FireSpec, PositionSpec};

/// The longest sequences of what sees every pair of tokens.
const PAIRS: usize = 16_384;
/// Of biases.
const BIASED: usize = 8192;
/// The tokens of the largest circuit, which has ten qubits.
const CIRCUIT: usize = 1024;

/// One row.
pub(super) struct Candidate {
    pub(super) name: &'static str,
    /// Whether a token is kept from seeing later ones.
    pub(super) causal: bool,
    /// The row of dense attention that is given the same and gives the same.
    pub(super) dense: &'static str,
    /// Beyond this it is left out.
    pub(super) longest: usize,
    pub(super) subject: Subject,
}

/// What is timed.
pub(super) enum Subject {
    /// A mechanism, between projections: queries, keys and values are given.
    Mechanism(Mechanism),
    /// Softmax in each of two bands of wavelets, given the same.
    Bands,
    /// Softmax with a bias of the scores that is learned, or made anew in each pass; given the same.
    Biased(PositionSpec),
    /// Attention with its projections, which are learned: tokens are given.
    Attention(fn(usize) -> MultiHeadSpec),
    /// A block of softmax attention and a feed-forward part, both learned, under an organisation of the
    /// tokens: tokens are given.
    Block(fn(&Surroundings<'_>) -> Option<OrganisationSpec>),
}

/// All rows, those that are given queries, keys and values first.
pub(super) fn candidates() -> Vec<Candidate> {
    let compared = mechanisms().iter().copied();
    let mut all: Vec<Candidate> = compared.map(given_projections).collect();
    all.push(Candidate {
        longest: CIRCUIT,
        ..given_projections(MEASURED)
    });
    all.extend(biased());
    all.extend(given_tokens());
    all
}

/// Weights that a circuit is measured as, with as many qubits as it takes to number the tokens and none
/// beside. A long sequence has more scores than the circuit has angles: those of the first queries turn it.
const MEASURED: Mechanism = Mechanism::new("doubly stochastic, circuit", false, true, |length| {
    let tokens = length.max(2);
    let qubits = tokens.next_power_of_two().ilog2() as usize;
    MechanismSpec::DoublyStochastic(DoublyStochasticSpec {
        operator: Operator::Circuit(CircuitSpec::new(tokens, qubits)),
    })
});

fn given_projections(mechanism: Mechanism) -> Candidate {
    Candidate {
        name: mechanism.name,
        causal: mechanism.causal,
        dense: match mechanism.causal {
            true => "softmax, causal",
            false => "softmax",
        },
        longest: match mechanism.quadratic {
            true => PAIRS,
            false => usize::MAX,
        },
        subject: match mechanism.wavelets {
            true => Subject::Bands,
            false => Subject::Mechanism(mechanism),
        },
    }
}

/// Biases of causal softmax: FIRE, and what it is compared with.
fn biased() -> Vec<Candidate> {
    let row = |name, position| Candidate {
        name,
        causal: true,
        dense: "softmax, causal",
        longest: BIASED,
        subject: Subject::Biased(position),
    };
    let buckets = PositionSpec::RelativeBuckets {
        buckets: 32,
        max_distance: 128,
    };
    vec![
        row("fire, causal", PositionSpec::Fire(FireSpec::default())),
        row("alibi, causal", PositionSpec::Alibi),
        row("relative buckets, causal", buckets),
        row(
            "kerple, logarithmic, causal",
            PositionSpec::KerpleLogarithmic,
        ),
        row("sandwich, causal", PositionSpec::Sandwich { width: 128 }),
    ]
}

/// Attention with its own projections, and blocks.
fn given_tokens() -> Vec<Candidate> {
    let row = |name, dense, longest, subject| Candidate {
        name,
        causal: false,
        dense,
        longest,
        subject,
    };
    let projected = "softmax, with projections";
    let block = "softmax block";
    vec![
        row(
            projected,
            projected,
            PAIRS,
            Subject::Attention(MultiHeadSpec::new),
        ),
        row(
            "crate, subspace attention",
            projected,
            PAIRS,
            Subject::Attention(subspaces),
        ),
        row(block, block, PAIRS, Subject::Block(|_| None)),
        row(
            "fit block, 4 latents of 64 tokens",
            block,
            usize::MAX,
            Subject::Block(|model| Some(interleaved(model))),
        ),
        row(
            "vcc block, 8 of 16 tokens in full",
            block,
            usize::MAX,
            Subject::Block(|_| Some(OrganisationSpec::VipCentric(VccSpec::new(16, 8)))),
        ),
    ]
}

/// CRATE's: what projects on the subspaces of the heads gives queries, keys and values in one.
fn subspaces(heads: usize) -> MultiHeadSpec {
    MultiHeadSpec {
        sharing: QueryKeySharing::All,
        bias: false,
        output_bias: Some(true),
        ..MultiHeadSpec::new(heads)
    }
}

/// A local block on groups of 64, a read, a global block like it on 4 latents of each group, a write.
fn interleaved(model: &Surroundings<'_>) -> OrganisationSpec {
    let group = model.length.clamp(1, 64);
    OrganisationSpec::Interleaved(FitSpec {
        // The last stage has no blocks: it is there to be written to.
        layout: "(1)1(0)".to_owned(),
        group,
        groups: model.length.div_ceil(group),
        latents: 4,
        width: None,
        block: model.blocks.first().cloned().map(Box::new),
        exchange_heads: None,
        read_feedforward: None,
        positions: GroupPositions::Learned,
        latent_positions: LatentPositions::Learned,
        tiles: None,
        condition: 0,
        output: FitOutput::Tokens,
    })
}
