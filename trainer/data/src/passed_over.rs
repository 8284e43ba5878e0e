//! Files that may be images of kinds that are not read, counted by their extensions: what is passed over is said. Texts and tables,
//! which lie beside images everywhere, are not.

use std::collections::BTreeMap;

use crate::decode::IMAGE_NAMES;

/// What is written of a file that is packed, before what packed it: `.tar.gz`, `.nii.gz`.
const PACKED: [&str; 6] = ["gz", "xz", "bz2", "zst", "lz4", "z"];

/// Files that hold others.
const ARCHIVES: [&str; 5] = ["zip", "7z", "rar", "tgz", "txz"];

/// Texts, tables and programs.
const TEXTS: [&str; 18] = [
    "txt", "md", "rst", "json", "jsonl", "csv", "tsv", "xml", "yaml", "yml", "toml", "ini", "html", "pdf",
    "log", "py", "sh", "ipynb",
];

/// The same, without extension.
const TEXT_NAMES: [&str; 5] = ["readme", "license", "copying", "makefile", "checksums"];

/// Kinds that are named one by one, at most.
const NAMED: usize = 6;

/// Numbers of files by extension, in lower case; "": none.
#[derive(Debug, Default)]
pub(crate) struct PassedOver(BTreeMap<String, u64>);

impl PassedOver {
    /// Counts a file.
    pub(crate) fn note(&mut self, name: &str) {
        let extension = extension(name);
        let is_text = match extension.as_str() {
            "" => TEXT_NAMES.contains(&&*name.to_ascii_lowercase()),
            other => TEXTS.contains(&other),
        };
        if !is_text {
            *self.0.entry(extension).or_default() += 1;
        }
    }

    /// `2 .tif, 1 .dcm`, the commonest first; none when nothing was counted.
    pub(crate) fn list(&self) -> Option<String> {
        let mut kinds: Vec<_> =
            self.0.iter().map(|(extension, &count)| (count, extension.as_str())).collect();
        kinds.sort_by_key(|&(count, extension)| (std::cmp::Reverse(count), extension));
        let rest: u64 = kinds.iter().skip(NAMED).map(|(count, _)| count).sum();
        let mut words: Vec<String> = kinds
            .iter()
            .take(NAMED)
            .map(|(count, extension)| match *extension {
                "" => format!("{count} without extension"),
                _ => format!("{count} .{extension}"),
            })
            .collect();
        if rest > 0 {
            words.push(format!("{rest} of other kinds"));
        }
        (!words.is_empty()).then(|| words.join(", "))
    }

    /// What can be done where nothing else is there.
    pub(crate) fn advice(&self) -> &'static str {
        let any = |is: &dyn Fn(&str) -> bool| self.0.keys().any(|extension| is(extension));
        if any(&|extension| {
            ARCHIVES.contains(&extension)
                || extension.rsplit('.').next().is_some_and(|last| PACKED.contains(&last))
        }) {
            ": unpack archives first"
        } else if any(&|extension| extension == "tar") {
            ": give the folder that the tar files are in"
        } else if self.0.is_empty() {
            ""
        } else {
            ": convert images of other formats first"
        }
    }
}

/// The names of files that are read: `*.jpg, *.jpeg, …`.
pub(crate) fn image_patterns() -> String {
    IMAGE_NAMES.map(|name| format!("*.{name}")).join(", ")
}

/// Of `a.TIF` it is `tif`, of `a.nii.gz` `nii.gz`. The number of a slice (`IM.0017`) is none, and of the kinds that are counted
/// there are not as many as files.
pub(crate) fn extension(name: &str) -> String {
    let is_one = |text: &str| {
        (1..=8).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric())
            && !text.bytes().all(|b| b.is_ascii_digit())
    };
    let name = name.to_ascii_lowercase();
    let Some((stem, last)) = name.rsplit_once('.').filter(|(_, last)| is_one(last)) else {
        return String::new();
    };
    match stem.rsplit_once('.') {
        Some((_, inner)) if PACKED.contains(&last) && is_one(inner) => format!("{inner}.{last}"),
        _ => last.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str]) -> PassedOver {
        let mut passed = PassedOver::default();
        names.iter().for_each(|name| passed.note(name));
        passed
    }

    #[test]
    fn kinds() {
        for (name, kind) in [
            ("a.TIF", "tif"),
            ("scan.nii.gz", "nii.gz"),
            ("x.tar.gz", "tar.gz"),
            ("x.gz", "gz"),
            ("README", ""),
            ("IM.0017", ""),
            ("a.", ""),
            ("end. A sentence", ""),
            ("a.verylongextension", ""),
            ("v1.2.gz", "gz"),
        ] {
            assert_eq!(extension(name), kind, "{name}");
        }
    }

    #[test]
    fn the_commonest_first() {
        assert_eq!(of(&[]).list(), None);
        assert_eq!(of(&["labels.csv", "notes.TXT", "README", "Readme.md"]).list(), None);
        let few = of(&["b.dcm", "a.tif", "IM0001", "README", "b.TIF"]);
        assert_eq!(few.list().unwrap(), "2 .tif, 1 without extension, 1 .dcm");
        let many = of(&["a.b", "a.c", "a.d", "a.e", "a.f", "a.g", "a.h", "a.i", "b.i"]);
        assert_eq!(many.list().unwrap(), "2 .i, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 2 of other kinds");
    }

    #[test]
    fn advice() {
        for (names, advice) in [
            (&["a.tif", "x.tar.gz"][..], ": unpack archives first"),
            (&["x.zip"], ": unpack archives first"),
            (&["a.tar"], ": give the folder that the tar files are in"),
            (&["a.tif"], ": convert images of other formats first"),
            (&[], ""),
        ] {
            assert_eq!(of(names).advice(), advice, "{names:?}");
        }
    }
}
