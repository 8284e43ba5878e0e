//! What is written, what is refused, what stays.

use std::{fs, io, path::Path};

use mentee_checkpoint::{
    CheckpointError, Dtype, FileSystem, LocalDisk, Meta, NewFile, Staging, Tensor, clean, file_name, list,
    newest, retain, write,
};
use tempfile::TempDir;

fn meta(step: u64) -> Meta {
    Meta {
        step,
        epoch: 0,
        world_size: 1,
        plan_hash: "p".into(),
        plan_toml: String::new(),
        data_digest: "d".into(),
        mentee_version: "0.1.0".into(),
        counts: mentee_checkpoint::Counts::default(),
    }
}

/// A checkpoint of two files whose bytes are all `value`.
fn write_value(folder: &Path, step: u64, value: u8) {
    let bytes = [value; 1000];
    let large = vec![Tensor::new("student.w", Dtype::U8, &[bytes.len()], &bytes)];
    let small = vec![Tensor::new("teacher.w", Dtype::U8, &[3], &bytes[..3])];
    write(folder, &meta(step), &[("a.safetensors".into(), large), ("b.safetensors".into(), small)]).unwrap();
}

fn newest_value(folder: &Path) -> Option<(u64, u8)> {
    let found = newest(folder).unwrap()?;
    let state = found.checkpoint.load().unwrap();
    Some((found.checkpoint.manifest.meta.step, state["teacher.w"].bytes()[0]))
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_replacement_cut_between_two_renames_is_found_and_finished() {
    // What the path for file systems without an atomic exchange leaves behind.
    let run = TempDir::new().unwrap();
    write_value(run.path(), 20, 1);
    let (folder, old) = (run.path().join("step-00000020"), run.path().join(".old-step-00000020"));
    fs::rename(&folder, &old).unwrap();
    assert_eq!(newest_value(run.path()), Some((20, 1)));
    clean(&LocalDisk, run.path()).unwrap();
    assert_eq!(names(run.path()), ["step-00000020"]);
    // Cut after the second rename.
    fs::rename(&folder, &old).unwrap();
    write_value(run.path(), 20, 2);
    assert_eq!(newest_value(run.path()), Some((20, 2)));
    clean(&LocalDisk, run.path()).unwrap();
    assert_eq!(names(run.path()), ["step-00000020"]);
}

#[test]
fn the_same_step_again_replaces_it() {
    let run = TempDir::new().unwrap();
    for value in [1, 1, 2] {
        write_value(run.path(), 5, value);
        assert_eq!(newest_value(run.path()), Some((5, value)));
        assert_eq!(names(run.path()), ["step-00000005"]);
    }
}

#[test]
fn the_state_has_one_digest_however_many_ranks_wrote_it() {
    let bytes: Vec<u8> = (0..=255).collect();
    let tensor = |n: usize| Tensor::new(format!("t{n}"), Dtype::U8, &[n + 1], &bytes[..n + 1]);
    let mut digests = Vec::new();
    for world_size in [1, 2, 3, 20] {
        let run = TempDir::new().unwrap();
        let open = || Staging::open(&LocalDisk, run.path(), 7, "a").unwrap();
        let mut files = Vec::new();
        // The last rank is the first to be done.
        for rank in (0..world_size).rev() {
            let share: Vec<_> = (0..10).filter(|n| n % world_size == rank).map(tensor).collect();
            if !share.is_empty() {
                files.push(open().write(&file_name(rank as u32, world_size as u32), &share).unwrap());
            }
        }
        let committed = open().commit(&meta(7), files).unwrap();
        assert_eq!(names(run.path()), ["step-00000007"]);
        let found = newest(run.path()).unwrap().unwrap().checkpoint;
        assert_eq!(found.manifest.state_digest, committed.state_digest);
        assert_eq!(found.manifest.files.len(), world_size.min(10));
        assert_eq!(found.load().unwrap().len(), 10);
        digests.push(committed.state_digest);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn shares_that_do_not_make_a_checkpoint_are_refused() {
    let names_of = names;
    let refused = |names: [&str; 2], spoil: &dyn Fn(&Path)| {
        let run = TempDir::new().unwrap();
        let open = || Staging::open(&LocalDisk, run.path(), 7, "a").unwrap();
        let files: Vec<_> = (0..2)
            .map(|rank| {
                open().write(&file_name(rank, 2), &[Tensor::new(names[rank as usize], Dtype::U8, &[1], &[1])])
            })
            .collect::<Result<_, _>>()
            .unwrap();
        spoil(&run.path().join(".tmp-step-00000007-a"));
        let error = open().commit(&meta(7), files).unwrap_err();
        assert!(names_of(run.path()).is_empty(), "the attempt stays");
        error
    };
    let error = refused(["t", "t"], &|_| ());
    assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
    let error = refused(["t", "u"], &|folder| fs::remove_file(folder.join(file_name(1, 2))).unwrap());
    assert!(matches!(error, CheckpointError::ShareNotSeen { .. }), "{error}");
    let error = refused(["t", "u"], &|folder| fs::write(folder.join(file_name(1, 2)), "cut").unwrap());
    assert!(matches!(error, CheckpointError::ShareNotSeen { .. }), "{error}");
}

#[test]
fn what_a_reader_would_refuse_is_not_written() {
    let run = TempDir::new().unwrap();
    let folder = run.path().join("checkpoints");
    let tensor = |name: &str| Tensor::new(name, Dtype::U8, &[1], &[0]);
    let refused = |files: &[(String, Vec<Tensor<'_>>)]| {
        let error = write(&folder, &meta(1), files).unwrap_err();
        assert!(!folder.exists());
        error
    };
    let error = refused(&[("../x.safetensors".into(), vec![tensor("t")])]);
    assert!(matches!(error, CheckpointError::FileName { .. }), "{error}");
    let error = refused(&[("x.safetensors".into(), vec![]), ("x.safetensors".into(), vec![])]);
    assert!(matches!(error, CheckpointError::DuplicateFile { .. }), "{error}");
    let error =
        refused(&[("x.safetensors".into(), vec![tensor("t")]), ("y.safetensors".into(), vec![tensor("t")])]);
    assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
    for name in ["", "__metadata__", "a\nb"] {
        let error = refused(&[("x.safetensors".into(), vec![tensor(name)])]);
        assert!(matches!(error, CheckpointError::TensorName { .. }), "{error}");
    }
    let error = refused(&[("x.safetensors".into(), vec![Tensor::new("t", Dtype::F32, &[2], &[0; 4])])]);
    let text =
        format!("{}: tensor t of shape [2] and type F32 has 4 bytes", folder.join("step-00000001").display());
    assert_eq!(error.to_string(), text);
}

#[test]
fn retention_keeps_the_newest_and_never_trusts_a_damaged_one() {
    let run = TempDir::new().unwrap();
    for step in [1, 2, 3, 4, 5] {
        write_value(run.path(), step, step as u8);
    }
    fs::remove_file(run.path().join("step-00000004/manifest.json")).unwrap();
    // Another rank may be writing the next one.
    fs::create_dir(run.path().join(".tmp-step-00000006-a")).unwrap();
    let removed = retain(&LocalDisk, run.path(), 2).unwrap();
    assert_eq!(removed, [run.path().join("step-00000001"), run.path().join("step-00000002")]);
    let kept = [".tmp-step-00000006-a", "step-00000003", "step-00000004", "step-00000005"];
    assert_eq!(names(run.path()), kept);
    clean(&LocalDisk, run.path()).unwrap();
    assert_eq!(names(run.path()), kept[1..]);
    let states: Vec<bool> = list(run.path()).unwrap().iter().map(|entry| entry.state.is_ok()).collect();
    assert_eq!(states, [true, false, true]);
    // The newest is damaged in its bytes, which only its digest shows: the older one must stay.
    let file = run.path().join("step-00000005/a.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    assert!(retain(&LocalDisk, run.path(), 1).unwrap().is_empty());
    let found = newest(run.path()).unwrap().unwrap();
    assert_eq!(found.checkpoint.manifest.meta.step, 3);
    assert!(matches!(found.rejected[0].1, CheckpointError::FileAltered { .. }));
    assert!(matches!(found.rejected[1].1, CheckpointError::NoManifest { .. }));
    // Zero still keeps one.
    write_value(run.path(), 6, 6);
    retain(&LocalDisk, run.path(), 0).unwrap();
    assert_eq!(newest_value(run.path()), Some((6, 6)));
}

#[test]
fn no_folder_means_no_checkpoint() {
    let run = TempDir::new().unwrap();
    let folder = run.path().join("checkpoints");
    assert!(newest(&folder).unwrap().is_none());
    assert!(list(&folder).unwrap().is_empty());
    assert!(retain(&LocalDisk, &folder, 3).unwrap().is_empty());
    clean(&LocalDisk, &folder).unwrap();
}

/// A disk on which a folder cannot be removed, as where a network file system keeps a file that is still open.
#[derive(Debug)]
struct Sticky;

impl FileSystem for Sticky {
    fn create_folders(&self, path: &Path) -> io::Result<()> {
        LocalDisk.create_folders(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        LocalDisk.create(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalDisk.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        LocalDisk.exchange(a, b)
    }

    fn remove_folder(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ResourceBusy.into())
    }
}

#[test]
fn rubbish_that_cannot_be_removed_keeps_no_checkpoint_from_use() {
    let run = TempDir::new().unwrap();
    write_value(run.path(), 20, 1);
    write_value(run.path(), 30, 3);
    for rubbish in [".tmp-step-00000021-a", ".tmp-step-00000022-a", ".old-step-00000030"] {
        fs::create_dir(run.path().join(rubbish)).unwrap();
    }
    fs::rename(run.path().join("step-00000020"), run.path().join(".old-step-00000020")).unwrap();
    let left = clean(&Sticky, run.path()).unwrap();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(left.iter().all(|error| error.is_passing() && error.to_string().starts_with("cannot remove ")));
    // What had to be done otherwise is done.
    assert!(run.path().join("step-00000020").is_dir());
    assert_eq!(newest_value(run.path()), Some((30, 3)));
}

#[test]
fn what_the_system_refuses_is_told_from_what_is_damaged() {
    let run = TempDir::new().unwrap();
    for step in [1, 2] {
        write_value(run.path(), step, 1);
        let manifest = run.path().join(format!("step-0000000{step}/manifest.json"));
        fs::remove_file(&manifest).unwrap();
        fs::create_dir(&manifest).unwrap(); // can be opened, and not be read
    }
    let error = newest(run.path()).unwrap_err();
    assert!(error.is_passing(), "{error:?}");
    fs::remove_dir(run.path().join("step-00000001/manifest.json")).unwrap();
    let error = newest(run.path()).unwrap_err();
    assert!(!error.is_passing(), "one of them is damaged: {error:?}");
    assert!(
        error.to_string().ends_with("restore one from a copy, or start in a new run directory"),
        "{error}"
    );
}

#[test]
fn a_checkpoint_that_cannot_be_looked_at_is_not_passed_over() {
    let run = TempDir::new().unwrap();
    let own = run.path().join("step-00000001");
    std::os::unix::fs::symlink("step-00000001", &own).unwrap();
    let error = newest(run.path()).unwrap_err();
    assert!(error.is_passing(), "a run would begin anew: {error:?}");
    fs::remove_file(&own).unwrap();
    fs::write(&own, "a file").unwrap();
    assert!(newest(run.path()).unwrap().is_none());
}
