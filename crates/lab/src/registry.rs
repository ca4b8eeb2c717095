//! Every system, once.

use crate::experiments;
use crate::joining::check_seeds;
use crate::{Error, Reproduction, Result, Setting};
use serde::Serialize;

/// What a system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A decomposition of a prediction.
    Explanation,
    /// A decomposition of a checkpoint.
    Compression,
    /// A survey or tutorial.
    Tutorial,
    /// A theory, made executable.
    Theory,
    /// A way to mix tokens.
    Attention,
    /// A part of a Transformer.
    Part,
}

/// A system from a paper.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct System {
    /// Its name on the command line.
    pub slug: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// Its authors.
    pub authors: &'static str,
    /// Year of publication.
    pub year: u16,
    /// arXiv id, where there is one.
    pub arxiv: Option<&'static str>,
    /// What it is.
    pub kind: Kind,
    /// Where it stands in this code.
    pub parts: &'static [&'static str],
    #[serde(skip)]
    experiment: fn(&Setting) -> Result<Reproduction>,
}

impl System {
    /// Runs the system's experiment.
    pub fn reproduce(&self, setting: &Setting) -> Result<Reproduction> {
        let started = std::time::Instant::now();
        let mut reproduction = (self.experiment)(setting)?;
        reproduction.slug = self.slug.to_owned();
        reproduction.title = self.title.to_owned();
        reproduction.scale = setting.scale;
        reproduction.seeds = vec![setting.seed];
        reproduction.seconds = started.elapsed().as_secs_f64();
        Ok(reproduction)
    }

    /// Runs the system's experiment once for each of `seeds`, one after the other, and joins what they
    /// found ([`Reproduction::joined`]). The seed of `setting` is not used; models are kept of the lowest
    /// seed.
    ///
    /// Many experiments take several seeds of their own at larger scales, those from theirs on: so far
    /// as they do, neighbouring seeds share runs.
    ///
    /// # Errors
    ///
    /// When no seed is given or one twice, or an experiment fails.
    pub fn reproduce_with_seeds(&self, setting: &Setting, seeds: &[u64]) -> Result<Reproduction> {
        check_seeds(seeds)?;
        if let [seed] = seeds {
            return self.reproduce(&Setting {
                seed: *seed,
                ..setting.clone()
            });
        }
        let lowest = seeds.iter().min();
        let run = |(index, seed): (usize, &u64)| {
            let models = setting.models.clone().filter(|_| lowest == Some(seed));
            let setting = Setting {
                seed: *seed,
                models,
                progress: setting.progress.under(format!("seed {seed}")),
                ..setting.clone()
            };
            setting.tell(|| format!("run {} of {}", index + 1, seeds.len()));
            self.reproduce(&setting).map_err(|cause| Error::Seed {
                seed: *seed,
                cause: Box::new(cause),
            })
        };
        let runs = seeds.iter().enumerate().map(run).collect::<Result<_>>()?;
        Reproduction::joined(runs)
    }
}

static SYSTEMS: &[System] = &[
    System {
        slug: "associative-memory",
        title: "Beyond Scaling Laws: Understanding Transformer Performance with Associative Memory",
        authors: "Niu, Bai, Deng, Han",
        year: 2024,
        arxiv: Some("2405.08707"),
        kind: Kind::Theory,
        parts: &["explain::analyses::energy"],
        experiment: experiments::energy::run,
    },
    System {
        slug: "attention-output-saes",
        title: "Interpreting Attention Layer Outputs with Sparse Autoencoders",
        authors: "Kissane, Krzyzanowski, Bloom, Conmy, Nanda",
        year: 2024,
        arxiv: Some("2406.17759"),
        kind: Kind::Explanation,
        parts: &[
            "explain::autoencoder",
            "explain::analyses::autoencoder",
            "explain::analyses::prefix_induction",
        ],
        experiment: experiments::autoencoder::run,
    },
    System {
        slug: "chefer",
        title: "Transformer Interpretability Beyond Attention Visualization",
        authors: "Chefer, Gur, Wolf",
        year: 2021,
        arxiv: Some("2012.09838"),
        kind: Kind::Explanation,
        parts: &["signal::relevance", "explain::chefer"],
        experiment: experiments::chefer::run,
    },
    System {
        slug: "clip-text-decomposition",
        title: "Interpreting CLIP's Image Representation via Text-Based Decomposition",
        authors: "Gandelsman, Efros, Steinhardt",
        year: 2023,
        arxiv: Some("2310.05916"),
        kind: Kind::Explanation,
        parts: &["explain::clip"],
        experiment: experiments::clip::run,
    },
    System {
        slug: "clustering",
        title: "A mathematical perspective on Transformers",
        authors: "Geshkovski, Letrouit, Polyanskiy, Rigollet",
        year: 2023,
        arxiv: Some("2312.10794"),
        kind: Kind::Theory,
        parts: &["explain::analyses::clustering"],
        experiment: experiments::clustering::run,
    },
    System {
        slug: "combiner",
        title: "Combiner: Full Attention Transformer with Sparse Computation Cost",
        authors: "Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai",
        year: 2021,
        arxiv: Some("2107.05768"),
        kind: Kind::Part,
        parts: &["parts::attention::mechanism::combiner"],
        experiment: experiments::combiner::run,
    },
    System {
        slug: "compression-survey",
        title: "A Survey on Transformer Compression",
        authors: "Tang, Wang, Guo, Tu, Han, Hu, Tao",
        year: 2024,
        arxiv: Some("2402.05964"),
        kind: Kind::Compression,
        parts: &[
            "compress::awq",
            "compress::gptq",
            "compress::int4",
            "compress::int8",
            "compress::recipe",
        ],
        experiment: experiments::compression_survey::run,
    },
    System {
        slug: "contextual-decomposition",
        title: "Efficient Automated Circuit Discovery in Transformers using Contextual \
                Decomposition",
        authors: "Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll, Yu",
        year: 2024,
        arxiv: Some("2407.00886"),
        kind: Kind::Explanation,
        parts: &["signal::contextual", "explain::contextual"],
        experiment: experiments::contextual::run,
    },
    System {
        slug: "crate",
        title: "White-Box Transformers via Sparse Rate Reduction",
        authors: "Yu, Buchanan, Pai, Chu, Wu, Tong, Haeffele, Ma",
        year: 2023,
        arxiv: Some("2306.01129"),
        kind: Kind::Attention,
        parts: &[
            "parts::attention::QueryKeySharing",
            "parts::feedforward::SparseCodeSpec",
            "parts::block::Wiring",
            "train::self_distillation",
        ],
        experiment: experiments::white_box::run,
    },
    System {
        slug: "curvature-edit",
        title: "From Memorization to Reasoning in the Spectrum of Loss Curvature",
        authors: "Merullo, Vatsavaya, Bushnaq, Lewis",
        year: 2025,
        arxiv: Some("2510.24256"),
        kind: Kind::Compression,
        parts: &["compress::curvature"],
        experiment: experiments::curvature::run,
    },
    System {
        slug: "decomposition-xai",
        title: "A Close Look at Decomposition-based XAI-Methods for Transformer Language Models",
        authors: "Arras, Puri, Kahardipraja, Lapuschkin, Samek",
        year: 2025,
        arxiv: Some("2502.15886"),
        kind: Kind::Explanation,
        parts: &[
            "signal::relevance",
            "explain::mixing",
            "explain::alti_logit",
            "explain::faithfulness",
        ],
        experiment: experiments::agreement::run,
    },
    System {
        slug: "decompx",
        title: "DecompX: Explaining Transformers Decisions by Propagating Token Decomposition",
        authors: "Modarressi, Fayyaz, Aghazadeh, Yaghoobzadeh, Pilehvar",
        year: 2023,
        arxiv: Some("2306.02873"),
        kind: Kind::Explanation,
        parts: &["signal::streams", "explain::decompx"],
        experiment: experiments::decompx::run,
    },
    System {
        slug: "dotresize",
        title: "DOTResize: Reducing LLM Width via Discrete Optimal Transport-based Neuron Merging",
        authors: "Verma, Murray, Duh",
        year: 2025,
        arxiv: Some("2507.04517"),
        kind: Kind::Compression,
        parts: &[
            "compress::dotresize",
            "compress::slicing",
            "compress::merged_features",
        ],
        experiment: experiments::dotresize::run,
    },
    System {
        slug: "ecoformer",
        title: "EcoFormer: Energy-Saving Attention with Linear Complexity",
        authors: "Liu, Pan, He, Cai, Zhuang",
        year: 2022,
        arxiv: Some("2209.09004"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::ecoformer"],
        experiment: experiments::ecoformer::run,
    },
    System {
        slug: "entropy-pruning",
        title: "Entropy-Based Block Pruning for Efficient Large Language Models",
        authors: "Yang, Xu, Tan, Sahoo, Savarese, Xiong, Wang, Heinecke",
        year: 2025,
        arxiv: Some("2504.03794"),
        kind: Kind::Compression,
        parts: &[
            "compress::entropy",
            "compress::entropy-attention",
            "compress::entropy-blocks",
            "compress::attention-cosine",
        ],
        experiment: experiments::entropy_pruning::run,
    },
    System {
        slug: "fastmax",
        title: "FAST: Factorizable Attention for Speeding up Transformers",
        authors: "Gerami, Hoover, Dulepet, Duraiswami",
        year: 2024,
        arxiv: Some("2402.07901"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::fastmax"],
        experiment: experiments::fastmax::run,
    },
    System {
        slug: "fire",
        title: "Functional Interpolation for Relative Positions Improves Long Context Transformers",
        authors: "Li, You, Guruganesh, Ainslie, Ontanon, Zaheer, Sanghai, Yang, Kumar, Bhojanapalli",
        year: 2023,
        arxiv: Some("2310.04418"),
        kind: Kind::Part,
        parts: &["parts::position::fire"],
        experiment: experiments::fire::run,
    },
    System {
        slug: "fit",
        title: "FIT: Far-reaching Interleaved Transformers",
        authors: "Chen, Li",
        year: 2023,
        arxiv: Some("2305.12689"),
        kind: Kind::Part,
        parts: &[
            "parts::organisation::fit",
            "parts::organisation::fit::denoiser",
        ],
        experiment: experiments::fit::run,
    },
    System {
        slug: "fusegpt",
        title: "FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers",
        authors: "Pei, Zhen, Yu, Pan, Yuan, Yu",
        year: 2024,
        arxiv: Some("2411.14507"),
        kind: Kind::Compression,
        parts: &["compress::fusegpt", "compress::macro_influence"],
        experiment: experiments::fusegpt::run,
    },
    System {
        slug: "fwsvd",
        title: "Language model compression with weighted low-rank factorization",
        authors: "Hsu, Hua, Chang, Lou, Shen, Jin",
        year: 2022,
        arxiv: Some("2207.00112"),
        kind: Kind::Compression,
        parts: &["factor::weighted", "compress::fwsvd"],
        experiment: experiments::fwsvd::run,
    },
    System {
        slug: "hidden-geometry",
        title: "Uncovering hidden geometry in Transformers via disentangling position and context",
        authors: "Song, Zhong",
        year: 2023,
        arxiv: Some("2310.04861"),
        kind: Kind::Explanation,
        parts: &["explain::analyses::geometry"],
        experiment: experiments::geometry::run,
    },
    System {
        slug: "information-pathways",
        title: "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
        authors: "Hussain, Zaki, Subramanian",
        year: 2023,
        arxiv: Some("2306.01705"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::subsampled", "model::ensemble"],
        experiment: experiments::information_pathways::run,
    },
    System {
        slug: "introduction-to-transformers",
        title: "An Introduction to Transformers",
        authors: "Turner",
        year: 2023,
        arxiv: Some("2304.10557"),
        kind: Kind::Tutorial,
        parts: &["parts::attention::multi_head", "parts::block"],
        experiment: experiments::introduction::run,
    },
    System {
        slug: "kernelized-transformer",
        title: "On Learning the Transformer Kernel",
        authors: "Chowdhury, Solomou, Dubey, Sachan",
        year: 2021,
        arxiv: Some("2110.08323"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::kernelized"],
        experiment: experiments::kernelized::run,
    },
    System {
        slug: "linearity",
        title: "Your Transformer is Secretly Linear",
        authors: "Razzhigaev, Mikhalchuk, Goncharova, Gerasimenko, Oseledets, Dimitrov, Kuznetsov",
        year: 2024,
        arxiv: Some("2405.12250"),
        kind: Kind::Explanation,
        parts: &[
            "explain::analyses::linearity",
            "compress::linearise",
            "compress::delete-linear",
        ],
        experiment: experiments::linearity::run,
    },
    System {
        slug: "linformer",
        title: "Linformer: Self-Attention with Linear Complexity",
        authors: "Wang, Li, Khabsa, Fang, Ma",
        year: 2020,
        arxiv: Some("2006.04768"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::linformer"],
        experiment: experiments::linformer::run,
    },
    System {
        slug: "lion",
        title: "Linear Attention for Efficient Bidirectional Sequence Modeling",
        authors: "Afzal, Abad Rocamora, Candogan, Puigdemont, Tonin, Wu, Shoaran, Cevher",
        year: 2025,
        arxiv: Some("2502.16249"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::lion"],
        experiment: experiments::lion::run,
    },
    System {
        slug: "logit-attribution",
        title: "A Mathematical Framework for Transformer Circuits: direct logit attribution",
        authors: "Elhage, Nanda, Olsson, Henighan, Joseph, Mann, Askell, et al.",
        year: 2021,
        arxiv: None,
        kind: Kind::Explanation,
        parts: &["signal::streams", "explain::logit_attribution"],
        experiment: experiments::logit_attribution::run,
    },
    System {
        slug: "lorap",
        title: "LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression for Large Language Models",
        authors: "Li, Tang, Zhang",
        year: 2024,
        arxiv: Some("2404.09695"),
        kind: Kind::Compression,
        parts: &["compress::methods::lorap", "compress::heal"],
        experiment: experiments::lorap::run,
    },
    System {
        slug: "mamba-shedder",
        title: "Mamba-Shedder: Post-Transformer Compression for Efficient Selective Structured State \
                Space Models",
        authors: "Muñoz, Yuan, Jain",
        year: 2025,
        arxiv: Some("2501.17088"),
        kind: Kind::Compression,
        parts: &[
            "compress::mamba-shedder",
            "compress::mamba-shedder-width",
            "compress::mamba-shedder-scan",
            "parts::recurrent::Mamba2",
        ],
        experiment: experiments::mamba_shedder::run,
    },
    System {
        slug: "mixers",
        title: "All mechanisms of attention on the same tasks",
        authors: "–",
        year: 2026,
        arxiv: None,
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism"],
        experiment: experiments::mixers::run,
    },
    System {
        slug: "modegpt",
        title: "MoDeGPT: Modular Decomposition for Large Language Model Compression",
        authors: "Lin, Gao, Smith, Patel, Tuli, Shen, Jin, Hsu",
        year: 2024,
        arxiv: Some("2408.09632"),
        kind: Kind::Compression,
        parts: &["compress::methods::modegpt"],
        experiment: experiments::modegpt::run,
    },
    System {
        slug: "mra",
        title: "Multi Resolution Analysis (MRA) for Approximate Self-Attention",
        authors: "Zeng, Pal, Kline, Fung, Singh",
        year: 2022,
        arxiv: Some("2207.10284"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::mra"],
        experiment: experiments::mra::run,
    },
    System {
        slug: "over-squashing",
        title: "Transformers need glasses! Information over-squashing in language tasks",
        authors: "Barbero, Banino, Kapturowski, Kumaran, Araújo, Vitvitskyi, Pascanu, Veličković",
        year: 2024,
        arxiv: Some("2406.04267"),
        kind: Kind::Explanation,
        parts: &["signal::rounding", "explain::analyses::squashing"],
        experiment: experiments::squashing::run,
    },
    System {
        slug: "pruning-study",
        title: "Can pruning make Large Language Models more efficient?",
        authors: "Gholami, Omar",
        year: 2023,
        arxiv: Some("2310.04573"),
        kind: Kind::Compression,
        parts: &[
            "compress::magnitude",
            "compress::random-weights",
            "compress::first-order",
            "compress::wanda",
            "compress::second-order",
            "compress::movement",
            "compress::prune-heads",
            "compress::channel-gradient",
            "compress::heal",
            "train::Masks",
            "kernels::CsrMatrix",
        ],
        experiment: experiments::pruning_study::run,
    },
    System {
        slug: "qdsformer",
        title: "Quantum Doubly Stochastic Transformers",
        authors: "Born, Skogh, Rhrissorrakrai, Utro, Wagner, Sobczyk",
        year: 2025,
        arxiv: Some("2504.16275"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::doubly_stochastic"],
        experiment: experiments::qdsformer::run,
    },
    System {
        slug: "rducb",
        title: "Are Random Decompositions all we need in High Dimensional Bayesian Optimisation?",
        authors: "Ziomek, Bou-Ammar",
        year: 2023,
        arxiv: Some("2301.12844"),
        kind: Kind::Compression,
        parts: &["search::rducb", "compress::automatic"],
        experiment: experiments::rducb::run,
    },
    System {
        slug: "reformer",
        title: "Reformer: The Efficient Transformer",
        authors: "Kitaev, Kaiser, Levskaya",
        year: 2020,
        arxiv: Some("2001.04451"),
        kind: Kind::Part,
        parts: &["parts::attention::mechanism::reformer"],
        experiment: experiments::reformer::run,
    },
    System {
        slug: "replaceme",
        title: "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block \
                Linearization",
        authors: "Shopkhoev, Ali, Zhussip, Malykh, Lefkimmiatis, Komodakis, Zagoruyko",
        year: 2025,
        arxiv: Some("2505.02819"),
        kind: Kind::Compression,
        parts: &["compress::replaceme", "compress::replaceme-cosine"],
        experiment: experiments::replace_me::run,
    },
    System {
        slug: "slicegpt",
        title: "How can representation dimension dominate structurally pruned LLMs?",
        authors: "Xu, Alazraki, Mandic",
        year: 2025,
        arxiv: Some("2503.04377"),
        kind: Kind::Compression,
        parts: &[
            "compress::slicegpt",
            "compress::slicing",
            "compress::dimension",
        ],
        experiment: experiments::slicegpt::run,
    },
    System {
        slug: "soft",
        title: "Softmax-free Linear Transformers",
        authors: "Lu, Zhang, Zhu, Feng, Xiang, Zhang",
        year: 2022,
        arxiv: Some("2207.03341"),
        kind: Kind::Attention,
        parts: &["parts::attention::mechanism::soft"],
        experiment: experiments::soft::run,
    },
    System {
        slug: "sparse-transformer",
        title: "Generating Long Sequences with Sparse Transformers",
        authors: "Child, Gray, Radford, Sutskever",
        year: 2019,
        arxiv: Some("1904.10509"),
        kind: Kind::Part,
        parts: &["parts::attention::mechanism::sparse"],
        experiment: experiments::sparse_transformer::run,
    },
    System {
        slug: "talking-heads",
        title: "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
        authors: "Merullo, Eickhoff, Pavlick",
        year: 2024,
        arxiv: Some("2406.09519"),
        kind: Kind::Explanation,
        parts: &["explain::analyses::channels"],
        experiment: experiments::talking_heads::run,
    },
    System {
        slug: "tree-field-integrators",
        title: "Fast Tree-Field Integrators: From Low Displacement Rank to Topological Transformers",
        authors: "Choromanski, Sehanobish, Basu Roy Chowdhury, Lin, Dubey, Sarlos, Chaturvedi",
        year: 2024,
        arxiv: Some("2406.15881"),
        kind: Kind::Attention,
        parts: &["factor::trees", "parts::attention::mechanism::topological"],
        experiment: experiments::tree_fields::run,
    },
    System {
        slug: "vcc",
        title: "Vcc: Scaling Transformers to 128K Tokens or More by Prioritizing Important Tokens",
        authors: "Zeng, Hawkins, Hong, Zhang, Pappas, Singh, Zheng",
        year: 2023,
        arxiv: Some("2305.04241"),
        kind: Kind::Part,
        parts: &["parts::organisation::vcc"],
        experiment: experiments::vcc::run,
    },
    System {
        slug: "wavspa",
        title: "WavSpA: Wavelet Space Attention for Boosting Transformers' Long Sequence Learning \
                Ability",
        authors: "Zhuang, Wang, Tao, Shang",
        year: 2022,
        arxiv: Some("2210.01989"),
        kind: Kind::Part,
        parts: &["parts::attention::wavelet"],
        experiment: experiments::wavspa::run,
    },
];

/// Every system.
pub fn systems() -> &'static [System] {
    SYSTEMS
}

/// The system of that name.
pub fn find(slug: &str) -> Result<&'static System> {
    SYSTEMS
        .iter()
        .find(|system| system.slug == slug)
        .ok_or_else(|| {
            let known: Vec<_> = SYSTEMS.iter().map(|system| system.slug).collect();
            Error::Unknown {
                slug: slug.to_owned(),
                known: known.join(", "),
            }
        })
}
