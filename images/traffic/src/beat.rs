//! `beat`: a byte to a file at a rate, and a page of memory written before each. Where the file is the serial console,
//! whoever reads it outside sees when programs in the machine stand still, by a clock that does not stop with them.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use crate::Failure;
use crate::arguments::Arguments;
use crate::pace::Pace;

const PAGE: usize = 4096;

/// `traffic beat`.
pub fn beat(arguments: &mut Arguments) -> Result<(), Failure> {
    let path = arguments.required::<PathBuf>("file")?;
    let bytes = arguments.bytes("bytes", Some(1 << 20), PAGE as u64..=1 << 30)?;
    let rate = arguments.rate()?;
    arguments.finish()?;
    let mut file = File::options().write(true).open(&path).map_err(|e| Failure::Io("open the file", e))?;
    let mut memory = vec![1_u8; bytes as usize];
    let mut pace = Pace::new(rate, Instant::now());
    let mut beats = 0_usize;
    loop {
        let now = Instant::now();
        let allowed = pace.allowed(now, 1);
        if allowed == 0 {
            std::thread::sleep(pace.wait(now, 1));
            continue;
        }
        let at = beats.wrapping_mul(PAGE) % memory.len();
        memory[at] = std::hint::black_box(memory[at].wrapping_add(1));
        file.write_all(b".").map_err(|e| Failure::Io("write", e))?;
        pace.did(1);
        beats += 1;
    }
}
