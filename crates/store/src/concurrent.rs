//! The same for many items, several at a time.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Does `work` for each item, at most `at_once` at a time. The results are in the items' order; after an error nothing
/// more is begun, and the first one in the items' order is returned.
pub(crate) fn try_each<T, R, E>(
    items: &[T],
    at_once: usize,
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E>
where
    T: Sync,
    R: Send,
    E: Send,
{
    let workers = at_once.min(items.len());
    if workers <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let one = || {
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { break };
            let result = work(item);
            stop.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push((at, result));
        }
        done
    };
    let mut done: Vec<(usize, Result<R, E>)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(one)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("work does not panic")).collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_the_first_error_ends_it() {
        let items: Vec<u32> = (0..500).collect();
        let doubled = try_each(&items, 7, |item| Ok::<_, ()>(item * 2)).unwrap();
        assert_eq!(doubled, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        let begun = AtomicUsize::new(0);
        let failed = try_each(&items, 3, |item| {
            begun.fetch_add(1, Ordering::Relaxed);
            if *item == 40 { Err(*item) } else { Ok(()) }
        });
        assert_eq!(failed, Err(40));
        assert!(begun.load(Ordering::Relaxed) < 60);
        assert_eq!(try_each(&[] as &[u32], 4, |_| Ok::<(), ()>(())), Ok(Vec::new()));
    }
}
