//! Errors of the command line on one line, as all others are.

/// What the argument parser says of a bad command line (`error: …`, tips, usage, each a paragraph), on one line. `None` for a
/// text that is no error, such as help.
pub fn one_line(text: &str) -> Option<String> {
    text.strip_prefix("error: ")?;
    let paragraphs =
        text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let parts: Vec<String> = paragraphs
        .filter(|paragraph| !paragraph.is_empty())
        .map(|paragraph| {
            if let Some(usage) = paragraph.strip_prefix("Usage: ") {
                format!("usage: {usage}")
            } else if paragraph.starts_with("For more information") {
                "see --help".to_owned()
            } else {
                paragraph
            }
        })
        .collect();
    Some(parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let text = "error: unexpected argument '--wrkers' found\n\n  tip: a similar argument exists: '--workers'\n\n\
                    Usage: mentee run [OPTIONS] <RECIPE>\n\nFor more information, try '--help'.\n";
        assert_eq!(
            one_line(text).as_deref(),
            Some(
                "error: unexpected argument '--wrkers' found; tip: a similar argument exists: '--workers'; \
                 usage: mentee run [OPTIONS] <RECIPE>; see --help"
            )
        );
        let text = "error: the following required arguments were not provided:\n  <RECIPE>\n\nUsage: mentee run <RECIPE>\n";
        assert_eq!(
            one_line(text).as_deref(),
            Some(
                "error: the following required arguments were not provided: <RECIPE>; usage: mentee run <RECIPE>"
            )
        );
        assert_eq!(one_line("mentee trains\n\nUsage: mentee\n"), None);
    }
}
