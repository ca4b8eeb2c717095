//! Attention patterns on a page: a small picture for each head, the chosen one large.

use anyhow::Result;
use lapidary_explain::analyses::attention::{HeadPattern, head_patterns};
use lapidary_explain::{Error, Question};
use maud::{Markup, PreEscaped, html};

/// Most weights that a page carries, a byte each.
const MAX_WEIGHTS: usize = 4 << 20;

const DRAW: &str = r"
for (const box of document.querySelectorAll('.patterns')) {
  const names = JSON.parse(box.querySelector('.names').textContent);
  const ink = getComputedStyle(document.documentElement).getPropertyValue('--for').trim().split(/\s+/);
  const weights = button => Uint8Array.from(atob(button.dataset.weights), c => c.charCodeAt(0));
  const draw = (canvas, bytes) => {
    const n = names.length;
    canvas.width = canvas.height = n;
    const context = canvas.getContext('2d');
    const image = context.createImageData(n, n);
    bytes.forEach((byte, i) => image.data.set([ink[0], ink[1], ink[2], byte], 4 * i));
    context.putImageData(image, 0, 0);
  };
  const large = box.querySelector('.large'), said = box.querySelector('output');
  let current = null;
  const choose = button => {
    for (const other of box.querySelectorAll('button')) other.setAttribute('aria-pressed', other === button);
    current = weights(button);
    draw(large, current);
    said.textContent = `head ${button.dataset.head}: ${button.dataset.about}`;
  };
  large.addEventListener('mousemove', event => {
    if (!current) return;
    const at = (offset, size) => Math.min(names.length - 1, Math.floor(offset / size * names.length));
    const key = at(event.offsetX, large.clientWidth), query = at(event.offsetY, large.clientHeight);
    said.textContent = `${names[query]} looks at ${names[key]}: ${(current[query * names.length + key] / 255).toFixed(2)}`;
  });
  for (const button of box.querySelectorAll('button')) {
    draw(button.querySelector('canvas'), weights(button));
    button.addEventListener('click', () => choose(button));
  }
  const first = box.querySelector('button');
  if (first) choose(first);
}
";

/// Every head of the question's first sequence; nothing for models whose mixers have no weights, and a sentence for those
/// whose blocks do not see the sequence.
pub fn attention_patterns(question: &Question<'_>, names: &[String]) -> Result<Markup> {
    let patterns = match head_patterns(question) {
        Ok(patterns) => patterns,
        // Of a model whose blocks see other tokens than these the rest of the page is there all the same.
        Err(error @ Error::Invalid { .. }) => {
            let text = format!("Where each head looks is left out: {error}.");
            return Ok(html! { section { p.legend { (text) } } });
        }
        Err(error) => return Err(error.into()),
    };
    let weights = patterns.len() * names.len() * names.len();
    if patterns.is_empty() {
        return Ok(html! {});
    }
    if weights > MAX_WEIGHTS {
        let text = "Where each head looks is left out: the input is too long for a page.";
        return Ok(html! { section { p.legend { (text) } } });
    }
    let blocks = patterns.last().map_or(0, |pattern| pattern.block + 1);
    Ok(html! {
        section.patterns {
            h2 { "Where each head looks" }
            p.legend { "A row for each layer, a square for each head; within it from each row to each column. The chosen head is drawn large." }
            div.layers {
                div {
                    @for block in 0..blocks {
                        div.layer {
                            span { (block) }
                            @for pattern in patterns.iter().filter(|pattern| pattern.block == block) {
                                button type="button" data-head=(format!("{block}.{}", pattern.head))
                                    data-about=(about(pattern)) data-weights=(bytes(pattern))
                                    aria-label=(format!("head {block}.{}, {}", pattern.head, about(pattern))) {
                                    canvas {}
                                }
                            }
                        }
                    }
                }
                div { canvas.large {} output {} }
            }
            script.names type="application/json" { (PreEscaped(json(names))) }
            script { (PreEscaped(DRAW)) }
        }
    })
}

fn about(pattern: &HeadPattern) -> String {
    format!(
        "{:.0} % on the first token, {:.0} % on the one before, {:.0} % on itself, {:.1} tokens away on average",
        100.0 * pattern.first,
        100.0 * pattern.previous,
        100.0 * pattern.own,
        pattern.distance
    )
}

/// The names as JSON that cannot end a script.
fn json(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| name.trim()).collect();
    serde_json::to_string(&names)
        .unwrap_or_else(|_| "[]".to_owned())
        .replace('<', "\\u003c")
}

/// A byte for each weight, in base 64.
fn bytes(pattern: &HeadPattern) -> String {
    let bytes: Vec<u8> = pattern
        .weights
        .iter()
        .flatten()
        .map(|weight| (255.0 * weight.clamp(0.0, 1.0)).round() as u8)
        .collect();
    base64(&bytes)
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let number = three.iter().fold(0u32, |n, byte| n << 8 | u32::from(*byte));
        let number = number << (8 * (3 - three.len()));
        for digit in 0..4 {
            if digit > three.len() {
                text.push('=');
            } else {
                let index = (number >> (18 - 6 * digit)) as usize & 63;
                text.push(char::from(DIGITS[index]));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::{DType, Device, Tensor};
    use lapidary_model::{Input, Model, ModelSpec};

    use super::*;

    #[test]
    fn base_64_pads_as_the_standard_says() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"f"), "Zg==");
        assert_eq!(base64(b"fo"), "Zm8=");
        assert_eq!(base64(b"foobar"), "Zm9vYmFy");
        assert_eq!(base64(&[255, 0, 254]), "/wD+");
    }

    #[test]
    fn heads_that_see_groups_are_left_out_with_a_sentence() {
        let text = "width = 8
            input = { kind = 'tokens', vocabulary = 11, length = 8 }
            head = { kind = 'language-model' }
            organisation = { kind = 'interleaved', layout = '(1)', group = 4, groups = 2 }
            [[blocks]]
            attention = { kind = 'multi-head', heads = 2, causal = true }";
        let spec: ModelSpec = toml::from_str(text).unwrap();
        let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu).unwrap();
        let ids = Tensor::from_slice(&[1u32, 2, 3, 4, 5, 6], (1, 6), &Device::Cpu).unwrap();
        let input = Input::tokens(ids);
        let names = ["a", "b", "c", "d", "e", "f"].map(str::to_owned);
        let page = attention_patterns(&Question::new(&model, &input), &names).unwrap();
        let page = page.into_string();
        assert!(
            page.contains("left out: organisation of the model is interleaved"),
            "{page}"
        );
    }

    #[test]
    fn names_cannot_end_the_script_they_stand_in() {
        let names = ["</script><b>".to_owned()];
        assert!(!json(&names).contains('<'));
    }
}
