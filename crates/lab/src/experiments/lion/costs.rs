//! What the forms cost by length: operations, time, and the memory that mixing holds.

use super::{FORMS, Size, specimen, with_form};
use crate::experiments::sequences::{crossover, exponent, quickest};
use crate::{Claim, Plot, Result, Series, Verdict};
use lapidary_kernels::DType;
use lapidary_kernels::memory::most_held;
use lapidary_parts::attention::mechanism::lion::{LionDecay, LionForm};

/// What one form costs: amounts by length.
#[derive(Debug, Default)]
struct Costs {
    operations: Vec<(f64, f64)>,
    milliseconds: Vec<(f64, f64)>,
    /// MiB held at a time beyond queries, keys and values; nothing where they aren't counted.
    held: Vec<(f64, f64)>,
}

/// What is claimed of the forms' costs, and their figures.
pub(super) fn run(size: &Size) -> Result<(Vec<Claim>, Vec<Plot>)> {
    let costs = measured(size)?;
    let claims = vec![of_operations(&costs), of_memory(&costs)];
    Ok((claims, plots(&costs)))
}

/// What each of [`FORMS`] costs.
fn measured(size: &Size) -> Result<[Costs; 3]> {
    let mut all: [Costs; 3] = Default::default();
    for ((form, _), costs) in FORMS.into_iter().zip(&mut all) {
        let longest = match form {
            LionForm::Parallel => size.longest_parallel,
            _ => size.longest,
        };
        let spec = with_form(LionDecay::Selective, form);
        let lengths = std::iter::successors(Some(256usize), |length| Some(2 * length));
        for length in lengths.take_while(|length| *length <= longest) {
            let (mixing, v) = specimen(&spec, length, DType::F32, 1)?;
            let at = length as f64;
            costs.operations.push((at, mixing.operations(16) as f64));
            let (mixed, held) = most_held(|| mixing.mix(&v));
            mixed?;
            let held = held.map(|bytes| (at, bytes as f64 / f64::from(1 << 20)));
            costs.held.extend(held);
            let best = quickest(3, || mixing.mix(&v).map(|_| ()).map_err(Into::into))?;
            costs.milliseconds.push((at, best * 1e3));
        }
    }
    Ok(all)
}

fn of_operations(costs: &[Costs; 3]) -> Claim {
    let exponents = costs.each_ref().map(|costs| exponent(&costs.operations));
    let [parallel, recurrent, chunked] = exponents;
    let near = |exponent: f64, claimed: f64| (exponent - claimed).abs() < 0.1;
    let holds = near(parallel, 2.0) && near(recurrent, 1.0) && near(chunked, 1.0);
    let [others, recurrence, chunks] = costs.each_ref().map(|costs| &costs.milliseconds);
    let meets = |ours: &[(f64, f64)]| {
        let at = crossover(ours, others);
        at.map_or("not in this range".to_owned(), |at| format!("{at}"))
    };
    Claim::new(
        "operations of the parallel form grow with the square of the length, those of the others \
         linearly",
        "quadratic and linear",
        format!(
            "exponents {parallel:.2}, {recurrent:.2} and {chunked:.2}; on this machine chunks are \
             quicker than the parallel form from {} tokens on, the recurrence from {}",
            meets(chunks),
            meets(recurrence)
        ),
        Verdict::of(holds),
    )
}

fn of_memory(costs: &[Costs; 3]) -> Claim {
    let exponents = costs.each_ref().map(|costs| exponent(&costs.held));
    let [parallel, recurrent, chunked] = exponents;
    // The longest that all forms have.
    let last = costs.iter().filter_map(|costs| costs.held.last());
    let longest = last.fold(f64::INFINITY, |least, (length, _)| least.min(*length));
    let [laid_out, carried, by_chunks] = costs.each_ref().map(|costs| {
        let found = costs.held.iter().find(|(length, _)| *length == longest);
        found.map_or(f64::NAN, |(_, held)| *held)
    });
    let (measured, verdict) = match exponents.iter().any(|exponent| exponent.is_nan()) {
        true => ("memory not counted".to_owned(), Verdict::NotMeasured),
        false => (
            format!(
                "exponents {parallel:.2}, {recurrent:.2} and {chunked:.2}; with {longest} tokens \
                 {laid_out:.2}, {carried:.2} and {by_chunks:.2} MiB"
            ),
            Verdict::of((parallel - 2.0).abs() < 0.1 && recurrent < 1.1 && chunked < 1.1),
        ),
    };
    Claim::new(
        "memory of the parallel form grows with the square of the length, that of the recurrence \
         and of chunks at most linearly",
        "quadratic and linear",
        measured,
        verdict,
    )
    .noted(
        "the most that one head of 16 features holds at a time to mix, beyond queries, keys, values \
         and decays, in pieces of at least 1 KiB",
    )
}

/// What all forms cost of one kind, by length.
fn plot(costs: &[Costs; 3], [title, y]: [&str; 2], of: fn(&Costs) -> &[(f64, f64)]) -> Plot {
    let series = FORMS.iter().zip(costs).map(|((_, name), costs)| Series {
        name: (*name).to_owned(),
        points: of(costs).to_vec(),
    });
    Plot {
        title: format!("{title} of the forms, one head of 16 features"),
        x: "tokens".to_owned(),
        y: y.to_owned(),
        series: series.collect(),
    }
}

fn plots(costs: &[Costs; 3]) -> Vec<Plot> {
    let mut plots = vec![plot(costs, ["Time", "milliseconds"], |costs| {
        &costs.milliseconds
    })];
    if costs.iter().all(|costs| !costs.held.is_empty()) {
        plots.push(plot(costs, ["Memory", "MiB"], |costs| &costs.held));
    }
    plots
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forms that hold `length^exponent`.
    fn held(exponents: [f64; 3]) -> [Costs; 3] {
        exponents.map(|exponent| Costs {
            held: [256.0, 512.0, 1024.0]
                .map(|length: f64| (length, length.powf(exponent)))
                .to_vec(),
            ..Costs::default()
        })
    }

    #[test]
    fn memory_is_judged_by_its_exponents() {
        let verdict = |exponents| of_memory(&held(exponents)).verdict;
        assert_eq!(verdict([2.0, 1.0, 0.9]), Verdict::Holds);
        assert_eq!(verdict([1.5, 1.0, 1.0]), Verdict::DoesNotHold);
        assert_eq!(verdict([2.0, 1.2, 1.0]), Verdict::DoesNotHold);
        assert_eq!(verdict([2.0, 1.0, 1.2]), Verdict::DoesNotHold);
        let uncounted: [Costs; 3] = Default::default();
        assert_eq!(of_memory(&uncounted).verdict, Verdict::NotMeasured);
    }

    /// All forms are told of at the longest length that each was run at.
    #[test]
    fn memory_is_told_where_all_forms_were_run() {
        let mut costs = held([2.0, 1.0, 1.0]);
        costs[0].held.pop();
        let told = of_memory(&costs).measured;
        assert!(
            told.ends_with("with 512 tokens 262144.00, 512.00 and 512.00 MiB"),
            "{told}"
        );
    }
}
