//! Classifiers by texts.

use super::{BARE, CLIP, REGISTERS, TEXT, difference, embedding, pixels, random};
use crate::common;
use lapidary_explain::clip::{ZeroShot, embed_texts};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Pass};

#[test]
fn a_zero_shot_classifier_says_the_class_of_the_embedding() {
    for (spec, classes, features) in [(CLIP, 5, 10), (REGISTERS, 3, 7)] {
        let model = common::model(spec, 3);
        let pixels = pixels(&model, 6, 5);
        let groups: Vec<Tensor> = (0..classes)
            .map(|class| {
                let rows = random(2, features, 40 + class);
                let values: Vec<f64> = (0..2)
                    .flat_map(|i| (0..features).map(move |j| (i, j)))
                    .map(|at| rows[at])
                    .collect();
                Tensor::from_vec(values, (2, features), &Device::Cpu).unwrap()
            })
            .collect();
        let zero_shot = ZeroShot::from_groups(&groups).unwrap();
        let expected = zero_shot.classify(&embedding(&model, &pixels)).unwrap();
        let classifier = zero_shot.classifier(&model).unwrap();
        let output = classifier
            .forward(&Input::Pixels(pixels.clone()), Pass::default())
            .unwrap();
        let said = output.into_logits().unwrap().into_value();
        assert_eq!(said.dims(), [6, classes as usize]);
        let said = said.argmax(1).unwrap().to_vec1::<u32>().unwrap();
        let said: Vec<usize> = said.into_iter().map(|class| class as usize).collect();
        assert_eq!(said, expected);
        // Features of another number are refused.
        let error = zero_shot.classifier(&common::model(BARE, 1)).unwrap_err();
        assert!(error.to_string().contains("projection"), "{error}");
    }
}

#[test]
fn the_text_of_one_sequence_does_not_depend_on_its_neighbours() {
    let text = common::model(TEXT, 4);
    let texts = [vec![1, 2, 19], vec![5, 6, 7, 8, 9, 19]];
    let both = embed_texts(&text, &texts).unwrap();
    let alone = embed_texts(&text, &texts[..1]).unwrap();
    assert!(difference(&both.narrow(0, 0, 1).unwrap(), &alone) < 1e-12);
    assert!(embed_texts(&text, &[Vec::<u32>::new()]).is_err());
    assert!(embed_texts::<Vec<u32>>(&text, &[]).is_err());
}
