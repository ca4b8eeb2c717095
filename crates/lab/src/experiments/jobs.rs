//! Independent jobs, such as models to be trained, on all threads.

use crate::{Error, Result, Setting};
use std::sync::Mutex;
use std::thread;

/// As much as a program's first thread has: graphs of deep models are walked recursively.
const STACK: usize = 8 << 20;

/// What each job gives, in the order of the jobs, which have names to be told by.
///
/// A job is on one thread from its start to its end, kernels and all. Small models hardly gain from
/// sharing a product, and what a job gives does not depend on how many threads there are.
pub(crate) fn in_parallel<J: Send, T: Send>(
    setting: &Setting,
    jobs: Vec<(String, J)>,
    run: impl Fn(J) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let count = jobs.len();
    let workers = rayon::current_num_threads().min(count);
    let queue = Mutex::new(jobs.into_iter().enumerate());
    let next = || queue.lock().ok()?.next();
    let work = || {
        let alone = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .stack_size(STACK)
            .build()
            .map_err(|error| Error::Experiment(format!("no thread for a job: {error}")))?;
        let mut done = Vec::new();
        while let Some((index, (name, job))) = next() {
            setting.tell(|| format!("{name}, {} of {count}", index + 1));
            match alone.install(|| run(job)) {
                Ok(found) => done.push((index, found)),
                Err(error) => {
                    // Nobody waits for the others any more.
                    while next().is_some() {}
                    return Err(error);
                }
            }
        }
        Ok(done)
    };
    let mut done = thread::scope(|scope| {
        let started: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut done = Vec::with_capacity(count);
        for worker in started {
            let broken = |_| Error::Experiment("a job broke off".to_owned());
            done.extend(worker.join().map_err(broken)??);
        }
        Ok::<_, Error>(done)
    })?;
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, found)| found).collect())
}

/// What `run` gives for each way with each seed of `setting.seed..`, under the way's name: every pair is a
/// job.
pub(crate) fn by_seed<W: Sync, T: Send>(
    setting: &Setting,
    task: &str,
    ways: &[(&'static str, W)],
    seeds: u64,
    run: impl Fn(&W, u64) -> Result<T> + Sync,
) -> Result<Vec<(&'static str, Vec<T>)>> {
    let pairs = ways.iter().flat_map(|way| {
        (setting.seed..)
            .take(seeds as usize)
            .map(move |seed| (way, seed))
    });
    let jobs = pairs
        .map(|((name, way), seed)| (format!("{task}: {name}, seed {seed}"), (way, seed)))
        .collect();
    let mut found = in_parallel(setting, jobs, |(way, seed)| run(way, seed))?.into_iter();
    let of = |(name, _): &(&'static str, W)| (*name, found.by_ref().take(seeds as usize).collect());
    Ok(ways.iter().map(of).collect())
}

/// What `run` gives for each seed of `setting.seed..`.
pub(crate) fn over_seeds<T: Send>(
    setting: &Setting,
    seeds: u64,
    run: impl Fn(u64) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let seeds = (setting.seed..).take(seeds as usize);
    let jobs = seeds.map(|seed| (format!("seed {seed}"), seed)).collect();
    in_parallel(setting, jobs, run)
}

/// [`by_seed`] of numbers, averaged over seeds.
pub(crate) fn means_by_seed<W: Sync>(
    setting: &Setting,
    task: &str,
    ways: &[(&'static str, W)],
    seeds: u64,
    run: impl Fn(&W, u64) -> Result<f64> + Sync,
) -> Result<Vec<(&'static str, f64)>> {
    let found = by_seed(setting, task, ways, seeds, run)?;
    let mean = |(name, each): (_, Vec<f64>)| (name, super::mean(each));
    Ok(found.into_iter().map(mean).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Progress;
    use std::sync::Arc;

    fn named(count: usize) -> Vec<(String, usize)> {
        (0..count).map(|job| (format!("job {job}"), job)).collect()
    }

    #[test]
    fn results_keep_the_order_of_their_jobs_and_each_is_told_of() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let lines = heard.clone();
        let setting = Setting {
            progress: Progress::to(move |line| lines.lock().unwrap().push(line.to_owned())),
            ..Setting::default()
        };
        // The first ones take longest.
        let found = in_parallel(&setting, named(9), |job| {
            thread::sleep(std::time::Duration::from_millis(9 - job as u64));
            Ok((job, rayon::current_num_threads()))
        });
        let expected: Vec<(usize, usize)> = (0..9).map(|job| (job, 1)).collect();
        assert_eq!(found.unwrap(), expected);
        let mut lines = heard.lock().unwrap().clone();
        lines.sort();
        assert_eq!(lines.len(), 9);
        assert_eq!(lines[0], "job 0, 1 of 9");
    }

    #[test]
    fn an_error_ends_the_rest() {
        let found = in_parallel(&Setting::default(), named(1000), |job| match job {
            3 => Err(Error::Experiment("the third".to_owned())),
            _ => Ok(job),
        });
        assert!(found.unwrap_err().to_string().contains("the third"));
    }

    #[test]
    fn ways_have_a_result_for_each_seed() {
        let setting = Setting {
            seed: 5,
            ..Setting::default()
        };
        let ways = [("one", 1), ("ten", 10)];
        let found = by_seed(&setting, "task", &ways, 3, |way, seed| Ok(way * seed)).unwrap();
        assert_eq!(found, [("one", vec![5, 6, 7]), ("ten", vec![50, 60, 70])]);
        let means = means_by_seed(&setting, "task", &ways, 3, |way, seed| {
            Ok((way * seed) as f64)
        });
        assert_eq!(means.unwrap(), [("one", 6.0), ("ten", 60.0)]);
    }
}
