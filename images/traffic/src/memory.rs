//! `memory`: dirties pages at a rate, in an order without pattern.

use std::time::Instant;

use crate::Failure;
use crate::arguments::Arguments;
use crate::pace::Pace;
use crate::status::{Line, PERIOD, StatusFile};

const PAGE: usize = 4096;

/// `traffic memory`.
pub fn dirty(arguments: &mut Arguments) -> Result<(), Failure> {
    let bytes = arguments.bytes("bytes", None, PAGE as u64..=1 << 40)?;
    let rate = arguments.rate()?;
    let mut status = StatusFile::optional(arguments)?;
    arguments.finish()?;

    let pages = (bytes as usize) / PAGE;
    let mut memory: Vec<u64> = Vec::new();
    let words = pages * PAGE / 8;
    memory
        .try_reserve_exact(words)
        .map_err(|_| Failure::Check(format!("--bytes {bytes}: this machine has no such memory")))?;
    // Not zeroes: a page of them costs a snapshot nothing.
    memory.extend((0..words as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));

    let mut pace = Pace::new(rate, Instant::now());
    let mut dirtied = 0_u64;
    loop {
        let now = Instant::now();
        let allowed = pace.allowed(now, 1024);
        for _ in 0..allowed {
            // A stride without a common divisor with most sizes: far apart, all in turn.
            let page = (dirtied as usize).wrapping_mul(0x9e37_79b1) % pages;
            let word = &mut memory[page * PAGE / 8];
            *word = std::hint::black_box(word.wrapping_add(2));
            dirtied += 1;
        }
        pace.did(allowed);
        status.update(|| Line::new("memory").value("bytes", pages * PAGE).value("dirtied", dirtied))?;
        if allowed == 0 {
            std::thread::sleep(pace.wait(now, 1).min(PERIOD));
        }
    }
}
