//! The minimum on fine grids, by looking at a few places at a time.

use std::ops::Range;

use rand::{Rng, RngExt};

use crate::{Costs, Domain, Error, Forest, Minimum, Point, Result, minimise};

/// Cuts each coordinate's places into `chunks` stretches, takes a random place of each, finds the
/// exact minimum over these, and goes on in the stretches that it lies in until they are single
/// places. With at least as many chunks as places this is the exact minimum over the domain.
///
/// `costs` is asked for the costs at some places of each coordinate.
///
/// # Errors
/// When there are less than two chunks, the forest has not the domain's variables, or `costs` fails
/// or gives other costs than those of its places on the forest.
pub fn zoom(
    domain: &Domain,
    forest: &Forest,
    chunks: usize,
    generator: &mut impl Rng,
    mut costs: impl FnMut(&[Vec<usize>]) -> Result<Costs>,
) -> Result<(Point, Minimum)> {
    if chunks < 2 {
        return Err(Error::invalid("number of chunks", chunks, "at least 2"));
    }
    if forest.dimensions() != domain.dimensions() {
        return Err(Error::invalid(
            "number of variables of the forest",
            forest.dimensions(),
            format!("{}, that of the domain", domain.dimensions()),
        ));
    }
    let mut stretches: Vec<Range<usize>> = (0..domain.dimensions())
        .map(|coordinate| 0..domain.places(coordinate))
        .collect();
    loop {
        let cut: Vec<Vec<Range<usize>>> = stretches
            .iter()
            .map(|stretch| cut(stretch.clone(), chunks))
            .collect();
        let mut draw = |stretch: &Range<usize>| match stretch.len() {
            1 => stretch.start,
            _ => generator.random_range(stretch.clone()),
        };
        let candidates: Vec<Vec<usize>> = cut
            .iter()
            .map(|parts| parts.iter().map(&mut draw).collect())
            .collect();
        let costs = costs(&candidates)?;
        let minimum = minimise(forest, &costs)?;
        for (variable, (costs, places)) in costs.single.iter().zip(&candidates).enumerate() {
            if costs.len() != places.len() {
                return Err(Error::invalid(
                    format!("number of costs of variable {variable}"),
                    costs.len(),
                    format!("{}, one for each place", places.len()),
                ));
            }
        }
        stretches = cut
            .iter()
            .zip(&minimum.choice)
            .map(|(parts, choice)| parts[*choice].clone())
            .collect();
        if stretches.iter().all(|stretch| stretch.len() == 1) {
            let point = stretches.iter().map(|stretch| stretch.start).collect();
            return Ok((point, minimum));
        }
    }
}

/// At most `chunks` stretches of nearly equal length, none empty.
fn cut(stretch: Range<usize>, chunks: usize) -> Vec<Range<usize>> {
    let (start, length) = (stretch.start, stretch.len());
    let chunks = chunks.min(length);
    (0..chunks)
        .map(|chunk| start + chunk * length / chunks..start + (chunk + 1) * length / chunks)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// Costs that a hash makes up for every place.
    fn made_up(forest: &Forest, candidates: &[Vec<usize>]) -> Costs {
        let number = |a: usize, b: usize, c: usize| {
            let mixed = (a * 7919 + b * 104_729 + c * 1_299_709 + 17) as u64;
            (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 1e7
        };
        Costs {
            single: candidates
                .iter()
                .enumerate()
                .map(|(i, places)| places.iter().map(|a| number(i, *a, 0)).collect())
                .collect(),
            pair: forest
                .edges()
                .iter()
                .map(|&(i, j)| {
                    let row =
                        |a: usize| candidates[j].iter().map(move |b| number(a, *b, i + 9 * j));
                    candidates[i].iter().flat_map(|a| row(*a)).collect()
                })
                .collect(),
        }
    }

    #[test]
    fn as_many_chunks_as_places_search_exactly() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let grids = [3, 7, 5, 1].map(|places| (0..places).map(f64::from).collect());
        let domain = Domain::new(grids.to_vec()).unwrap();
        for _ in 0..20 {
            let forest = Forest::random(4, 2, &mut generator).unwrap();
            let every: Vec<Vec<usize>> = (0..4).map(|i| (0..domain.places(i)).collect()).collect();
            let exact = minimise(&forest, &made_up(&forest, &every)).unwrap();
            for chunks in [7, 12] {
                let (point, minimum) =
                    zoom(&domain, &forest, chunks, &mut generator, |candidates| {
                        Ok(made_up(&forest, candidates))
                    })
                    .unwrap();
                assert_eq!(point, exact.choice);
                assert_eq!(minimum.value, exact.value);
            }
        }
    }

    #[test]
    fn what_is_reported_is_the_cost_at_the_point() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let domain = Domain::uniform(6, 0.0, 1.0, 150).unwrap();
        let forest = Forest::random(6, 4, &mut generator).unwrap();
        let mut looked = 0;
        let (point, minimum) = zoom(&domain, &forest, 4, &mut generator, |candidates| {
            looked += 1;
            Ok(made_up(&forest, candidates))
        })
        .unwrap();
        assert_eq!(looked, 4, "150 places in four rounds of four");
        let alone: Vec<Vec<usize>> = point.iter().map(|place| vec![*place]).collect();
        let there = made_up(&forest, &alone).at(&forest, &[0; 6]).unwrap();
        assert!((there - minimum.value).abs() < 1e-12);
    }

    #[test]
    fn what_does_not_fit_the_domain_is_refused() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let domain = Domain::uniform(2, 0.0, 1.0, 5).unwrap();
        let mut refused = |dimensions: usize, chunks: usize, places: usize| {
            let forest = Forest::new(dimensions, Vec::new()).unwrap();
            let found = zoom(&domain, &forest, chunks, &mut generator, |_| {
                Ok(made_up(&forest, &[vec![0; 3], vec![0; places]]))
            });
            found.unwrap_err().to_string()
        };
        assert_eq!(
            refused(3, 3, 3),
            "number of variables of the forest is 3, but must be 2, that of the domain"
        );
        assert_eq!(
            refused(2, 1, 3),
            "number of chunks is 1, but must be at least 2"
        );
        assert_eq!(
            refused(2, 3, 4),
            "number of costs of variable 1 is 4, but must be 3, one for each place"
        );
    }

    #[test]
    fn stretches_cover_without_overlap() {
        for (length, chunks) in [(150, 4), (3, 4), (9, 4), (1, 2)] {
            let parts = cut(5..5 + length, chunks);
            assert_eq!(parts.len(), chunks.min(length));
            assert!(parts.iter().all(|part| !part.is_empty()));
            let all: Vec<usize> = parts.into_iter().flatten().collect();
            assert!(all.into_iter().eq(5..5 + length));
        }
    }
}
