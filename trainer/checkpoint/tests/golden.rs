//! The format, byte by byte: a checkpoint as literal bytes, which the writer must produce and the reader
//! accept, and one test per way in which it can be damaged. A change that breaks one of these needs a new
//! format version.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mentee_checkpoint::{
    CheckpointError, Counts, Dtype, Manifest, Meta, Tensor, VERSION, newest, open, write,
};
use tempfile::TempDir;

/// Version 2: `student.fc.bias` = f32 [1.0, -2.0] and `student.flag` = u8 [7], in that order: floats have the larger
/// alignment.
const STATE: &[u8] = b"\x20\x01\0\0\0\0\0\0\
{\"__metadata__\":{\"blake3\":\"\
54847fa2028a3457068a78ba8e6a086cccf672def025d7e4cb2761b538edbf3f\
448bd8dd9624154a690f8e84dc52d6f633ba7cd545c4d3c9b4e0f6a2f6fa71f4\"},\
\"student.fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\
\"student.flag\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[8,9]}}\
\0\0\x80\x3f\0\0\0\xc0\x07";

const MANIFEST: &str = include_str!("golden/manifest.json");

/// The same state in version 1.
const STATE_1: &[u8] = b"\x88\0\0\0\0\0\0\0\
{\"student.fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\
\"student.flag\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[8,9]}}     \
\0\0\x80\x3f\0\0\0\xc0\x07";

const MANIFEST_1: &str = include_str!("golden/manifest-1.json");

/// The same state with counts, in version 3.
const MANIFEST_3: &str = include_str!("golden/manifest-3.json");

fn meta() -> Meta {
    Meta {
        step: 1000,
        epoch: 3,
        world_size: 2,
        plan_hash: "89abcdef01234567".into(),
        plan_toml: "[run]\nseed = 0\n".into(),
        data_digest: "d1".into(),
        mentee_version: "0.1.0".into(),
        counts: Counts::default(),
    }
}

/// The state, in another order than the file has it.
fn tensors() -> Vec<Tensor<'static>> {
    vec![
        Tensor::new("student.flag", Dtype::U8, &[1], &[7]),
        Tensor::new("student.fc.bias", Dtype::F32, &[2], &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]),
    ]
}

/// A run's checkpoint folder that holds the golden checkpoint.
fn golden() -> (TempDir, PathBuf) {
    let run = TempDir::new().unwrap();
    let folder = run.path().join("step-00001000");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("state.safetensors"), STATE).unwrap();
    fs::write(folder.join("manifest.json"), MANIFEST).unwrap();
    (run, folder)
}

/// Why the golden checkpoint cannot be used after `damage`; every public way of reading has to agree.
fn refused(damage: impl Fn(&Path)) -> CheckpointError {
    let (run, folder) = golden();
    damage(&folder);
    assert!(open(&folder).and_then(|checkpoint| checkpoint.verify()).is_err());
    let error = newest(run.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::NoneUsable { .. }), "{error}");
    open(&folder).and_then(|checkpoint| checkpoint.load()).unwrap_err()
}

/// [`refused`] for a manifest that is replaced by another text.
fn refused_manifest(text: impl AsRef<[u8]>) -> CheckpointError {
    refused(|folder| fs::write(folder.join("manifest.json"), &text).unwrap())
}

/// The manifest with one text replaced, signed again: only the replaced content is wrong.
fn resigned(from: &str, to: &str) -> String {
    assert!(MANIFEST.contains(from), "{from}");
    let mut value: serde_json::Value = serde_json::from_str(&MANIFEST.replace(from, to)).unwrap();
    value["manifest_digest"] = "".into();
    // The hashed form is the compact one with the fields in the order of the file.
    let order = ["format", "version", "meta", "files", "state_digest", "manifest_digest"];
    let meta_order =
        ["step", "epoch", "world_size", "plan_hash", "plan_toml", "data_digest", "mentee_version"];
    let object = |value: &serde_json::Value, keys: &[&str]| {
        let fields: Vec<String> = keys.iter().map(|key| format!("{key:?}:{}", value[*key])).collect();
        format!("{{{}}}", fields.join(","))
    };
    let files: Vec<String> = value["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| object(file, &["name", "bytes", "blake3"]))
        .collect();
    let fields: Vec<String> = order
        .iter()
        .map(|key| match *key {
            "meta" => format!("\"meta\":{}", object(&value["meta"], &meta_order)),
            "files" => format!("\"files\":[{}]", files.join(",")),
            key => format!("{key:?}:{}", value[key]),
        })
        .collect();
    let compact = format!("{{{}}}", fields.join(","));
    let digest = blake3::hash(compact.as_bytes()).to_hex().to_string();
    compact.replace("\"manifest_digest\":\"\"", &format!("\"manifest_digest\":\"{digest}\""))
}

/// The golden checkpoint with other bytes in its file, for which the manifest vouches.
fn refused_file(bytes: &[u8]) -> CheckpointError {
    let digest = blake3::hash(bytes).to_hex().to_string();
    let old = blake3::hash(STATE).to_hex().to_string();
    let manifest = resigned(&old, &digest)
        .replace(&format!("\"bytes\":{}", STATE.len()), &format!("\"bytes\":{}", bytes.len()));
    let manifest = sign(&manifest);
    refused(|folder| {
        fs::write(folder.join("state.safetensors"), bytes).unwrap();
        fs::write(folder.join("manifest.json"), &manifest).unwrap();
    })
}

/// Signs a compact manifest.
fn sign(compact: &str) -> String {
    let at = compact.find("\"manifest_digest\":\"").unwrap() + "\"manifest_digest\":\"".len();
    let unsigned = format!("{}\"}}", &compact[..at]);
    let digest = blake3::hash(unsigned.as_bytes()).to_hex().to_string();
    format!("{}{digest}\"}}", &compact[..at])
}

#[test]
fn the_writer_produces_exactly_these_bytes() {
    let run = TempDir::new().unwrap();
    let folder = write(run.path(), &meta(), &[("state.safetensors".into(), tensors())]).unwrap();
    assert_eq!(folder, run.path().join("step-00001000"));
    assert_eq!(fs::read(folder.join("state.safetensors")).unwrap(), STATE);
    assert_eq!(fs::read_to_string(folder.join("manifest.json")).unwrap(), MANIFEST);
}

#[test]
fn counts_make_it_version_3() {
    let (run, counts) =
        (TempDir::new().unwrap(), Counts { collapsed_steps: 7, online_correct: 5, online_views: 9 });
    let meta = Meta { counts, ..meta() };
    let folder = write(run.path(), &meta, &[("state.safetensors".into(), tensors())]).unwrap();
    assert_eq!(fs::read(folder.join("state.safetensors")).unwrap(), STATE);
    assert_eq!(fs::read_to_string(folder.join("manifest.json")).unwrap(), MANIFEST_3);
    let read = newest(run.path()).unwrap().unwrap();
    assert_eq!((read.checkpoint.manifest.meta, read.tensors.len()), (meta, 2));
    // Part of what the digest is of.
    fs::write(folder.join("manifest.json"), MANIFEST_3.replace(": 7,", ": 8,")).unwrap();
    assert!(matches!(open(&folder).unwrap_err(), CheckpointError::ManifestAltered { .. }));
}

#[test]
fn the_format_is_described() {
    let format = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("FORMAT.md")).unwrap();
    assert!(format.starts_with(&format!("# Checkpoint format, version {VERSION}\n")));
    let newest = format.lines().rfind(|line| line.starts_with("| ")).unwrap();
    assert!(newest.starts_with(&format!("| {VERSION} | ")), "{newest}");
}

#[test]
fn the_reader_accepts_them() {
    let (run, folder) = golden();
    let found = newest(run.path()).unwrap().unwrap();
    assert!(found.rejected.is_empty());
    assert_eq!(found.checkpoint.folder, folder);
    assert_eq!(found.checkpoint.manifest.meta, meta());
    let state = found.checkpoint.load().unwrap();
    assert_eq!(state.len(), 2);
    let bias = &state["student.fc.bias"];
    assert_eq!((bias.dtype, bias.shape.as_slice()), (Dtype::F32, [2].as_slice()));
    assert_eq!(bias.bytes(), [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
    assert_eq!(state["student.flag"].bytes(), [7]);
}

#[test]
fn white_space_in_the_manifest_does_not_matter_to_its_digest() {
    let compact = resigned("1000", "1000");
    assert_eq!(Manifest::parse(compact.as_bytes(), Path::new("m")).unwrap().meta, meta());
}

#[test]
fn every_cut_of_the_file_is_refused() {
    for len in 0..STATE.len() {
        let error = refused(|folder| fs::write(folder.join("state.safetensors"), &STATE[..len]).unwrap());
        let CheckpointError::FileLength { expected, found, .. } = error else { panic!("{error}") };
        assert_eq!((expected, found), (STATE.len() as u64, len as u64));
    }
}

#[test]
fn every_flipped_bit_of_the_file_is_refused() {
    let (_run, folder) = golden();
    let checkpoint = open(&folder).unwrap();
    for bit in 0..STATE.len() * 8 {
        let mut bytes = STATE.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(folder.join("state.safetensors"), &bytes).unwrap();
        let error = checkpoint.load().unwrap_err();
        assert!(matches!(error, CheckpointError::FileAltered { .. }), "{error}");
    }
    let error = refused(|folder| fs::write(folder.join("state.safetensors"), [0; STATE.len()]).unwrap());
    assert!(matches!(error, CheckpointError::FileAltered { .. }), "{error}");
}

#[test]
fn a_longer_file_is_refused() {
    let error =
        refused(|folder| fs::write(folder.join("state.safetensors"), [STATE, b"\0"].concat()).unwrap());
    assert!(matches!(error, CheckpointError::FileLength { .. }), "{error}");
}

#[test]
fn a_missing_file_is_named() {
    let error = refused(|folder| fs::remove_file(folder.join("state.safetensors")).unwrap());
    assert!(matches!(error, CheckpointError::MissingFile { .. }), "{error}");
    assert!(error.to_string().contains("state.safetensors: missing"), "{error}");
}

#[test]
fn a_folder_in_the_place_of_a_file_is_refused() {
    let error = refused(|folder| {
        fs::remove_file(folder.join("state.safetensors")).unwrap();
        fs::create_dir(folder.join("state.safetensors")).unwrap();
    });
    assert!(matches!(error, CheckpointError::MissingFile { .. }), "{error}");
}

#[test]
fn a_missing_manifest_means_an_incomplete_checkpoint() {
    let error = refused(|folder| fs::remove_file(folder.join("manifest.json")).unwrap());
    assert!(matches!(error, CheckpointError::NoManifest { .. }), "{error}");
}

#[test]
fn a_pipe_in_the_place_of_the_manifest_is_not_waited_for() {
    let error = refused(|folder| {
        fs::remove_file(folder.join("manifest.json")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.join("manifest.json")).status();
        assert!(made.unwrap().success());
    });
    assert!(error.to_string().ends_with("not a checkpoint manifest: it is no file"), "{error}");
}

#[test]
fn every_cut_of_the_manifest_is_refused() {
    // The last byte is the newline, which is no part of the JSON.
    for len in 0..MANIFEST.len() - 1 {
        let error = refused_manifest(&MANIFEST[..len]);
        assert!(matches!(error, CheckpointError::ManifestSyntax { .. }), "{len}: {error}");
    }
}

#[test]
fn every_flipped_bit_of_the_manifest_is_refused_or_changes_white_space_only() {
    for bit in 0..MANIFEST.len() * 8 {
        let mut bytes = MANIFEST.as_bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        match Manifest::parse(&bytes, Path::new("manifest.json")) {
            Ok(manifest) => {
                assert!(MANIFEST.as_bytes()[bit / 8].is_ascii_whitespace());
                assert_eq!(manifest, Manifest::parse(MANIFEST.as_bytes(), Path::new("m")).unwrap());
            }
            Err(
                CheckpointError::ManifestSyntax { .. }
                | CheckpointError::ManifestAltered { .. }
                | CheckpointError::UnsupportedVersion { .. },
            ) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn an_altered_manifest_is_refused() {
    let error = refused_manifest(MANIFEST.replace("\"world_size\": 2", "\"world_size\": 4"));
    assert!(matches!(error, CheckpointError::ManifestAltered { .. }), "{error}");
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let error = refused_manifest(r#"{"format": "mentee-checkpoint", "version": 4, "something": "new"}"#);
    assert!(matches!(error, CheckpointError::UnsupportedVersion { found: 4, supported: 3, .. }), "{error}");
}

#[test]
fn other_json_is_refused() {
    for text in [
        "",
        "[]",
        "null",
        "{}",
        r#"{"format": "other", "version": 1}"#,
        "{\"format\": \"mentee-checkpoint\"}",
    ] {
        let error = refused_manifest(text);
        assert!(matches!(error, CheckpointError::ManifestSyntax { .. }), "{error}");
    }
    let error = refused_manifest(b"\xff\xfe");
    assert!(matches!(error, CheckpointError::ManifestSyntax { .. }), "{error}");
    let error = refused_manifest(MANIFEST.replace("\"epoch\"", "\"epoque\""));
    assert!(matches!(error, CheckpointError::ManifestSyntax { .. }), "{error}");
}

#[test]
fn an_endless_manifest_is_not_read_to_its_end() {
    let error = refused(|folder| {
        fs::File::create(folder.join("manifest.json")).unwrap().set_len(1 << 40).unwrap();
    });
    assert!(matches!(error, CheckpointError::ManifestTooLarge { .. }), "{error}");
}

#[test]
fn file_names_cannot_leave_the_folder() {
    for name in [
        "../state.safetensors",
        "/etc/state.safetensors",
        "sub/state.safetensors",
        "sub\\\\state.safetensors",
        "..safetensors",
        ".safetensors",
        "state.safetensors/",
        "manifest.json",
        "",
        "state.safetensors\\u0000",
        "c:state.safetensors",
    ] {
        let error = refused_manifest(resigned("\"state.safetensors\"", &format!("\"{name}\"")));
        assert!(matches!(error, CheckpointError::FileName { .. }), "{name}: {error}");
    }
}

#[test]
fn a_file_listed_twice_is_refused() {
    let manifest = resigned("1000", "1000");
    let (start, end) = (manifest.find("[{").unwrap() + 1, manifest.find("}]").unwrap() + 1);
    let entry = &manifest[start..end];
    let twice = sign(&manifest.replace(entry, &format!("{entry},{entry}")));
    let error = refused_manifest(twice);
    assert!(matches!(error, CheckpointError::DuplicateFile { .. }), "{error}");
}

#[test]
fn absurd_lengths_in_the_manifest_are_compared_with_the_file_first() {
    for bytes in ["18446744073709551615", "9223372036854775808", "1099511627776"] {
        let error = refused_manifest(resigned(
            &format!("\"bytes\": {}", STATE.len()),
            &format!("\"bytes\": {bytes}"),
        ));
        assert!(matches!(error, CheckpointError::FileLength { .. }), "{error}");
    }
    for bytes in ["18446744073709551616", "-1", "1.5", "\"1\""] {
        let text = MANIFEST.replace(&format!("\"bytes\": {}", STATE.len()), &format!("\"bytes\": {bytes}"));
        let error = refused_manifest(text);
        assert!(matches!(error, CheckpointError::ManifestSyntax { .. }), "{error}");
    }
}

#[test]
fn absurd_headers_inside_a_file_are_refused() {
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let tensor = |rest: &str| format!("{{\"t\":{{{rest}}}}}");
    for bytes in [
        b"".to_vec(),
        b"\0\0\0".to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        1_000_000u64.to_le_bytes().to_vec(),
        file("not json", 0),
        file(&tensor(r#""dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,8]"#), 8),
        file(&tensor(r#""dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]"#), 0),
        file(&tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4),
        file(&tensor(r#""dtype":"F32","shape":[2],"data_offsets":[8,16]"#), 16),
        file(&tensor(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), 8),
        file(&tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), 7),
        file(&tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), 9),
    ] {
        let error = refused_file(&bytes);
        assert!(matches!(error, CheckpointError::Safetensors { .. }), "{error}");
    }
    let error = refused_file(&file(&tensor(r#""dtype":"F16","shape":[2],"data_offsets":[0,4]"#), 4));
    assert!(matches!(error, CheckpointError::UnsupportedDtype { .. }), "{error}");
    let error = refused_file(&file(r#"{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1));
    assert!(matches!(error, CheckpointError::TensorName { .. }), "{error}");
}

#[test]
fn an_intact_file_of_another_state_is_refused() {
    let mut bytes = STATE.to_vec();
    *bytes.last_mut().unwrap() = 8;
    let error = refused_file(&bytes);
    assert!(
        matches!(&error, CheckpointError::TensorAltered { name, .. } if name == "student.flag"),
        "{error}"
    );
    // Another name for the same bytes.
    let at = STATE.windows(4).position(|window| window == b"flag").unwrap();
    let mut bytes = STATE.to_vec();
    bytes[at..at + 4].copy_from_slice(b"glad");
    let error = refused_file(&bytes);
    assert!(matches!(error, CheckpointError::StateDigest { .. }), "{error}");
}

#[test]
fn a_header_without_digests_is_refused() {
    let key = STATE.windows(6).position(|window| window == b"blake3").unwrap();
    let spoiled = |at: usize, byte: u8| {
        let mut bytes = STATE.to_vec();
        bytes[at] = byte;
        refused_file(&bytes)
    };
    for (at, byte) in [(key, b'B'), (key + 9, b'x')] {
        let error = spoiled(at, byte);
        assert!(matches!(error, CheckpointError::Safetensors { .. }), "{error}");
    }
}

#[test]
fn version_1_still_loads() {
    let run = TempDir::new().unwrap();
    let folder = run.path().join("step-00001000");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("state.safetensors"), STATE_1).unwrap();
    fs::write(folder.join("manifest.json"), MANIFEST_1).unwrap();
    let old = newest(run.path()).unwrap().unwrap().checkpoint;
    let (_run, folder) = golden();
    let new = open(&folder).unwrap();
    assert_eq!((old.manifest.version, new.manifest.version), (1, 2));
    assert_eq!(old.manifest.meta, new.manifest.meta);
    // The digest of a state does not depend on the version.
    assert_eq!(old.manifest.state_digest, new.manifest.state_digest);
    assert_eq!(old.load().unwrap(), new.load().unwrap());
}

#[test]
fn a_renamed_folder_is_refused() {
    let (run, folder) = golden();
    fs::rename(&folder, run.path().join("step-00002000")).unwrap();
    let error = open(&run.path().join("step-00002000")).unwrap_err();
    let CheckpointError::StepMismatch { folder_step: 2000, manifest_step: 1000, .. } = error else {
        panic!("{error}")
    };
}
