//! Progress of an operation: a bar on a terminal, a line for each step elsewhere, nothing with `--json`.
//!
//! Owns the bar; it is gone when this is dropped, whichever way the command ends. Warnings are shown always.

use std::time::Duration;

use diorama_api::{Notice, Progress, ProgressUnit};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::{Output, printable};

/// Shows an operation's notices.
#[derive(Debug)]
pub struct Reporter<'a> {
    output: &'a Output,
    bar: Option<ProgressBar>,
    step: String,
}

impl<'a> Reporter<'a> {
    /// Shows nothing until the first notice.
    pub fn new(output: &'a Output) -> Self {
        Self { output, bar: None, step: String::new() }
    }

    /// Shows one notice.
    pub fn show(&mut self, notice: Notice) {
        match notice {
            Notice::Warning(message) => self.aside(|output| output.warn(&message)),
            Notice::Progress(progress) if self.output.draws_progress() => self.draw(&progress),
            Notice::Progress(progress) => {
                // Scripts that read one document do not want a commentary, unless they say so.
                let quiet = self.output.json() && self.output.verbosity() == 0;
                if !quiet && progress.step != self.step {
                    self.output.errors(&format!("{}\n", printable(&progress.step)));
                    self.step = progress.step;
                }
            }
        }
    }

    fn draw(&mut self, progress: &Progress) {
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if progress.step != self.step {
            self.step.clone_from(&progress.step);
            bar.reset();
            bar.set_message(printable(&progress.step).into_owned());
        }
        let template = match (progress.unit, progress.total, progress.done) {
            (ProgressUnit::Bytes, Some(_), _) => {
                "{spinner} {msg} {bar:30} {binary_bytes}/{binary_total_bytes}"
            }
            (ProgressUnit::Items, Some(_), _) => "{spinner} {msg} {bar:30} {pos}/{len}",
            (ProgressUnit::Bytes, None, Some(_)) => "{spinner} {msg} {binary_bytes}",
            (ProgressUnit::Items, None, Some(_)) => "{spinner} {msg} {pos}",
            (_, None, None) => "{spinner} {msg}",
        };
        // The templates are constants: one that does not parse leaves the default style, and shows in the first run.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━━─"));
        }
        if let Some(total) = progress.total {
            bar.set_length(total);
        }
        bar.set_position(progress.done.unwrap_or(0));
    }

    fn aside(&self, print: impl FnOnce(&Output)) {
        match &self.bar {
            Some(bar) => bar.suspend(|| print(self.output)),
            None => print(self.output),
        }
    }
}

impl Drop for Reporter<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
