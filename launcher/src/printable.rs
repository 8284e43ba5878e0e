//! Text of a run directory's files on a terminal, which it is not to steer; and whether ours may.

use std::ffi::OsStr;
use std::io::IsTerminal;

/// Whether standard output is a terminal that understands colours and the like.
pub fn on_a_terminal() -> bool {
    std::io::stdout().is_terminal() && understands(std::env::var_os("TERM").as_deref())
}

/// Of the value of `TERM`: a shell in Emacs is a terminal, and prints what is to steer it.
fn understands(term: Option<&OsStr>) -> bool {
    term.is_some_and(|term| !term.is_empty() && term != "dumb")
}

/// What stands in a run directory's files, in one line for a terminal: what would steer it is escaped.
pub fn printable(text: &str) -> String {
    escaped(text, "\\n", "\\t")
}

/// The same of a text of several lines, which cannot be taken for lines of ours.
pub fn printable_lines(text: &str) -> String {
    escaped(&text.replace("\r\n", "\n"), "\n    ", "\t")
}

fn escaped(text: &str, end_of_line: &str, tab: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut line, letter| {
        match letter {
            '\n' => line.push_str(end_of_line),
            '\t' => line.push_str(tab),
            _ if letter.is_control() => line.push_str(&format!("\\x{:02x}", u32::from(letter))),
            _ if turns_around(letter) => line.extend(letter.escape_unicode()),
            _ => line.push(letter),
        }
        line
    })
}

/// Whether it changes the order in which what follows is shown.
fn turns_around(letter: char) -> bool {
    matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// JSON for a terminal: its strings may hold control characters from DEL on as they are.
pub fn printable_json(json: &str) -> String {
    json.chars().fold(String::with_capacity(json.len()), |mut text, letter| {
        if ('\u{7f}'..='\u{9f}').contains(&letter) || turns_around(letter) {
            text.push_str(&format!("\\u{:04x}", u32::from(letter)));
        } else {
            text.push(letter);
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dumb_terminal_is_not_steered() {
        let answers = [None, Some(""), Some("dumb"), Some("xterm-256color"), Some("linux")]
            .map(|term| understands(term.map(OsStr::new)));
        assert_eq!(answers, [false, false, false, true, true]);
    }

    #[test]
    fn what_steers_a_terminal_is_escaped() {
        let text = "é\x1b[31m\u{9b}2J\x7f\r\n\tx\u{202e}";
        assert_eq!(printable(text), "é\\x1b[31m\\x9b2J\\x7f\\x0d\\n\\tx\\u{202e}");
        assert_eq!(printable_lines(text), "é\\x1b[31m\\x9b2J\\x7f\n    \tx\\u{202e}");
        let json = serde_json::json!({ "a": text }).to_string();
        let printed = printable_json(&json);
        assert!(!printed.chars().any(|letter| letter.is_control() || turns_around(letter)), "{printed:?}");
        let same = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        assert_eq!(same(&printed), same(&json));
    }
}
