//! Entries over many images: shares, ablations, edits and heat.

use super::{CLIP, REGISTERS, TEXT, difference, pixels};
use crate::common;
use lapidary_explain::clip::{
    Component, EditedClassifier, HeadOutputs, ImageTower, StreamingMean, Survey, ZeroShot,
    embed_texts, heat_maps, mean_ablated, nearest, spurious_edit,
};
use lapidary_factor::matrix_from_tensor;
use lapidary_kernels::{Device, Tensor};
use lapidary_model::Model;

/// A tower, some images, and a classifier of random directions.
fn study(model: &Model) -> (ImageTower<'_>, Tensor, ZeroShot) {
    let tower = ImageTower::new(model).unwrap();
    let text = common::model(TEXT, 4);
    let texts: Vec<Vec<u32>> = (0..6).map(|i| vec![i, 2 * i, i + 3, 19]).collect();
    let vectors = embed_texts(&text, &texts).unwrap();
    let groups: Vec<Tensor> = (0..3)
        .map(|c| vectors.narrow(0, 2 * c, 2).unwrap())
        .collect();
    (
        tower,
        pixels(model, 12, 6),
        ZeroShot::from_groups(&groups).unwrap(),
    )
}

#[test]
fn ablating_nothing_changes_nothing_and_ablating_all_leaves_no_difference() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, classes) = study(&model);
    let decomposition = tower.decompose(&pixels).unwrap();
    let components = decomposition.components().unwrap();
    // The mean does not depend on how the data set is cut.
    let mut means = StreamingMean::default();
    for start in [0, 5, 10] {
        let count = 5.min(12 - start);
        means
            .add(&components.narrow(0, start, count).unwrap())
            .unwrap();
    }
    let means = means.mean().unwrap();
    assert!(difference(&means, &components.mean(0).unwrap()) < 1e-12);

    let plain = classes.classify(decomposition.embeddings()).unwrap();
    assert!(plain.iter().any(|class| *class != plain[0]), "{plain:?}");
    let count = tower.components().len();
    let none = mean_ablated(&components, &means, &vec![false; count]).unwrap();
    assert!(difference(&none, decomposition.embeddings()) < 1e-12);
    let all = mean_ablated(&components, &means, &vec![true; count]).unwrap();
    let first = all.narrow(0, 0, 1).unwrap();
    assert!(difference(&all, &first.broadcast_as(all.dims()).unwrap()) < 1e-12);

    let edited = |ablated: &[Component]| {
        let means = means.clone();
        let edited = EditedClassifier::new(&tower, classes.clone(), means, ablated).unwrap();
        edited.classify(&pixels).unwrap()
    };
    assert_eq!(edited(&[]), plain);
    let constant = edited(tower.components());
    assert!(constant.iter().all(|class| *class == constant[0]));

    // Any entries: those of tokens sum likewise.
    let entries = decomposition.entries(1).unwrap().flatten(1, 2).unwrap();
    let marks = vec![false; entries.dims()[1]];
    let same = mean_ablated(&entries, &entries.mean(0).unwrap(), &marks).unwrap();
    assert!(difference(&same, &entries.sum(1).unwrap()) < 1e-12);
    assert!(mean_ablated(&entries, &means, &marks).is_err());
}

#[test]
fn an_edit_names_the_parts_that_the_paper_ablates() {
    let model = common::model(CLIP, 3);
    let tower = ImageTower::new(&model).unwrap();
    let head = Component::Head { layer: 2, head: 1 };
    let edit = spurious_edit(&tower, 1, &[head]);
    let kept: Vec<String> = tower
        .components()
        .iter()
        .filter(|component| !edit.contains(component))
        .map(ToString::to_string)
        .collect();
    assert_eq!(kept, ["2.0", "2.2", "2.3"]);
    let missing = tower.index_of(Component::Head { layer: 3, head: 0 });
    assert!(missing.unwrap_err().to_string().contains("below 3"));
}

#[test]
fn outputs_on_disk_are_those_in_memory_and_leave_no_file() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, _) = study(&model);
    let heads = [
        Component::Head { layer: 0, head: 3 },
        Component::Feedforward { layer: 1 },
    ];
    let directory = std::env::temp_dir().join(format!("clip-outputs-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let mut disk = HeadOutputs::on_disk(&tower, &heads, &directory).unwrap();
    let mut memory = HeadOutputs::in_memory(&tower, &heads).unwrap();
    let components = tower.decompose(&pixels).unwrap().components().unwrap();
    for start in [0, 7] {
        let batch = components.narrow(0, start, 5).unwrap();
        disk.add(&batch).unwrap();
        memory.add(&batch).unwrap();
    }
    assert_eq!(disk.images(), 10);
    for head in heads {
        let index = tower.index_of(head).unwrap();
        let (one, other) = (disk.of(head).unwrap(), memory.of(head).unwrap());
        assert_eq!(one, other);
        let truth = components.get(7).unwrap().get(index).unwrap();
        let truth = truth.to_vec1::<f64>().unwrap();
        for (found, truth) in one.row(5).iter().zip(truth) {
            assert!((found - truth).abs() < 1e-6);
        }
    }
    assert!(disk.of(Component::Embeddings).is_err());
    drop(disk);
    std::fs::remove_dir(&directory).unwrap();
}

#[test]
fn a_survey_shares_out_the_embedding_and_its_variance() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, classes) = study(&model);
    let heads: Vec<Component> = (0..4)
        .map(|head| Component::Head { layer: 2, head })
        .collect();
    let outputs = HeadOutputs::in_memory(&tower, &heads).unwrap();
    let mut survey = Survey::new(&tower, outputs);
    for start in [0, 6] {
        survey.add(&pixels.narrow(0, start, 6).unwrap()).unwrap();
    }
    let effects = survey.layer_effects().unwrap();
    let parts: Vec<&str> = effects.iter().map(|effect| effect.part.as_str()).collect();
    assert_eq!(parts[..3], ["embeddings", "attention 0", "feedforward 0"]);
    for total in [
        effects.iter().map(|effect| effect.share).sum::<f64>(),
        effects.iter().map(|effect| effect.variance).sum(),
    ] {
        assert!((total - 1.0).abs() < 1e-10);
    }
    let names: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
    let report = survey.report(&names, classes.vectors(), 2).unwrap();
    assert_eq!(report.tables[1].rows.len(), 4);
    assert_eq!(report.maps[0].values.len(), 3);
    assert!(survey.report(&names[..2], classes.vectors(), 2).is_err());

    // The image of which a head says most of a text is found by looking at all.
    let vectors = matrix_from_tensor("classes", classes.vectors()).unwrap();
    let text: Vec<f64> = vectors.row(1).iter().copied().collect();
    let said = survey.outputs().of(heads[2]).unwrap();
    let found = nearest(said.as_ref(), &text, 12).unwrap();
    assert_eq!(found.len(), 12);
    assert!(found.windows(2).all(|two| two[0].1 >= two[1].1));
}

#[test]
fn heat_is_what_patches_add_to_a_class_beyond_the_mean_class() {
    let model = common::model(REGISTERS, 3);
    let tower = ImageTower::new(&model).unwrap();
    let pixels = pixels(&model, 2, 6);
    let decomposition = tower.decompose(&pixels).unwrap();
    let vectors = Tensor::randn(0.0, 1.0, (3, 7), &Device::Cpu).unwrap();
    let groups: Vec<Tensor> = (0..3).map(|c| vectors.narrow(0, c, 1).unwrap()).collect();
    let classes = ZeroShot::from_groups(&groups).unwrap();
    let heats: Vec<Vec<f64>> = (0..3)
        .map(|class| {
            let maps = heat_maps(&decomposition, &classes, &[0, class]).unwrap();
            maps[1].values.clone()
        })
        .collect();
    assert_eq!(
        heats[0].len(),
        4,
        "patches, without class token and registers"
    );
    for patch in 0..4 {
        let sum: f64 = heats.iter().map(|heat| heat[patch]).sum();
        assert!(sum.abs() < 1e-12, "the classes' heats are relative");
    }
    let alone = ZeroShot::from_groups(&groups[..1]).unwrap();
    let heat = heat_maps(&decomposition, &alone, &[0, 0]).unwrap();
    assert_eq!(heat[0].values, [0.0; 4]);
    assert!(heat_maps(&decomposition, &classes, &[0]).is_err());
    assert!(heat_maps(&decomposition, &classes, &[0, 3]).is_err());
}
