//! What programs say to people. `println!` ends a program whose reader is gone (`mentee run | tee log`, Ctrl-C) or whose disk is
//! full; what is said must not end what is done.

use std::io::{BufWriter, ErrorKind, Stdout, Write};

/// `1 image`, `2 images`, `2 classes`.
#[must_use]
pub fn counted(number: u64, what: &str) -> String {
    let ending = match what {
        _ if number == 1 => "",
        _ if what.ends_with('s') => "es",
        _ => "s",
    };
    format!("{number} {what}{ending}")
}

/// A line on standard output, for what goes on whether it is read or not.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => { $crate::say::line(&mut ::std::io::stdout(), ::std::format_args!($($words)*)) };
}

/// A line on standard error.
#[macro_export]
macro_rules! complain {
    ($($words:tt)*) => { $crate::say::line(&mut ::std::io::stderr(), ::std::format_args!($($words)*)) };
}

/// A line on standard output that is what the command is there for: a reader who has seen enough ends it quietly, output
/// that is lost (a full disk) with an error.
#[macro_export]
macro_rules! show {
    ($($words:tt)*) => { $crate::say::result(::std::format_args!($($words)*)) };
}

/// For [`say!`] and [`complain!`]: one write, so that lines of several threads do not mix; whether it succeeds or not.
pub fn line(to: &mut impl Write, words: std::fmt::Arguments<'_>) {
    let _ = to.write_all(format!("{words}\n").as_bytes());
}

/// For [`show!`].
pub fn result(words: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout();
    end_unless_heard(out.write_all(format!("{words}\n").as_bytes()).and_then(|()| out.flush()));
}

/// Many lines as [`show!`] takes one: written when there are enough of them, or at [`Results::flush`].
#[derive(Debug)]
pub struct Results(BufWriter<Stdout>);

impl Results {
    /// None yet.
    #[expect(clippy::new_without_default, reason = "it stands for standard output")]
    pub fn new() -> Self {
        Self(BufWriter::new(std::io::stdout()))
    }

    /// One line.
    pub fn line(&mut self, words: std::fmt::Arguments<'_>) {
        end_unless_heard(writeln!(self.0, "{words}"));
    }

    /// Text with its own ends of lines.
    pub fn text(&mut self, text: &[u8]) {
        end_unless_heard(self.0.write_all(text));
    }

    /// Writes what has not been.
    pub fn flush(&mut self) {
        end_unless_heard(self.0.flush());
    }
}

fn end_unless_heard(written: std::io::Result<()>) {
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(crate::exit_code::DONE),
        Err(error) => {
            complain!("error: cannot write to standard output: {error}");
            std::process::exit(crate::exit_code::FAILED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural() {
        let said = [(0, "step"), (1, "step"), (2, "step"), (1, "class"), (2, "class")];
        assert_eq!(
            said.map(|(n, what)| counted(n, what)),
            ["0 steps", "1 step", "2 steps", "1 class", "2 classes"]
        );
    }
}
