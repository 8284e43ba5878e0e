//! The power is cut before, in and after every change that a writer makes to the disk. Whatever a disk may hold then,
//! the newest complete checkpoint loads, and none of the older is harmed.
//!
//! What it may hold is decided by a model that promises as little as POSIX does: the content of a file counts once it
//! was synced, a name in a folder once the folder was; of everything later any part may be there and any part not, in
//! any order. A write may be there in part, or as zeros, or as what lay on the disk before.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use mentee_checkpoint::{
    Checkpoint, CheckpointError, Committed, Dtype, FileSystem, LocalDisk, Meta, NewFile, Staging, Tensor,
    clean, file_name, list, newest, retain,
};
use tempfile::TempDir;

/// States of the disk that are tried for each cut: all of what was not synced, nothing of it, and random parts.
const STATES: u64 = 24;

type Node = usize;

/// A change to a folder's names.
#[derive(Debug, Clone)]
enum Change {
    Set(String, Node),
    Remove(String),
    Rename(String, String, Node),
    Exchange(String, Node, String, Node),
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, Node>) {
        match self {
            Change::Set(name, node) => drop(names.insert(name.clone(), *node)),
            Change::Remove(name) => drop(names.remove(name)),
            Change::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Change::Exchange(a, node_a, b, node_b) => {
                names.insert(a.clone(), *node_b);
                names.insert(b.clone(), *node_a);
            }
        }
    }
}

#[derive(Debug)]
enum Content {
    Folder { on_disk: BTreeMap<String, Node>, pending: Vec<Change> },
    File { on_disk: Vec<u8>, pending: Vec<Vec<u8>> },
}

/// What comes after so many changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The power is cut in the last of them.
    PowerCut,
    /// The last of them is refused, and no other.
    Refusal,
}

/// What is on the disk, and what is on its way there.
#[derive(Debug)]
struct Model {
    /// Changes until the fault.
    left: usize,
    fault: Fault,
    nodes: Vec<Content>,
}

fn folder() -> Content {
    Content::Folder { on_disk: BTreeMap::new(), pending: Vec::new() }
}

impl Model {
    fn names(&self, node: Node) -> BTreeMap<String, Node> {
        let Content::Folder { on_disk, pending } = &self.nodes[node] else { return BTreeMap::new() };
        let mut names = on_disk.clone();
        pending.iter().for_each(|change| change.apply(&mut names));
        names
    }

    fn find(&self, path: &Path) -> Option<Node> {
        path.iter().try_fold(0, |node, name| self.names(node).get(name.to_str()?).copied())
    }

    /// The folder that holds `path`, and the name in it.
    fn place(&self, path: &Path) -> (Node, String) {
        let parent = self.find(path.parent().unwrap()).unwrap_or_else(|| panic!("no folder for {path:?}"));
        (parent, path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn change(&mut self, folder: Node, change: Change) {
        let Content::Folder { pending, .. } = &mut self.nodes[folder] else {
            panic!("{folder} is no folder")
        };
        pending.push(change);
    }

    fn add(&mut self, path: &Path, content: Content) -> Node {
        self.nodes.push(content);
        let node = self.nodes.len() - 1;
        let (parent, name) = self.place(path);
        self.change(parent, Change::Set(name, node));
        node
    }

    fn remove_all(&mut self, node: Node) {
        for (name, child) in self.names(node) {
            self.remove_all(child);
            self.change(node, Change::Remove(name));
        }
    }

    /// Lays out below `path` what a power cut at this moment could leave of `node`.
    fn lay_out(&self, node: Node, path: &Path, chance: &mut Chance) {
        match &self.nodes[node] {
            Content::Folder { on_disk, pending } => {
                fs::create_dir_all(path).unwrap();
                let mut names = on_disk.clone();
                pending.iter().filter(|_| chance.kept()).for_each(|change| change.apply(&mut names));
                for (name, node) in names {
                    self.lay_out(node, &path.join(name), chance);
                }
            }
            Content::File { on_disk, pending } => {
                let mut bytes = on_disk.clone();
                for part in pending {
                    match chance.of_a_write() {
                        Write::Whole => bytes.extend(part),
                        Write::Torn(share) => {
                            bytes.extend(&part[..(part.len() as f64 * share) as usize]);
                            break;
                        }
                        Write::Zeros => bytes.resize(bytes.len() + part.len(), 0),
                        Write::Stale => bytes.extend(part.iter().map(|byte| byte ^ 0x5a)),
                    }
                }
                fs::write(path, bytes).unwrap();
            }
        }
    }
}

enum Write {
    Whole,
    Torn(f64),
    Zeros,
    Stale,
}

/// Decides what of the unsynced is there.
enum Chance {
    Everything,
    Nothing,
    Random(u64),
}

impl Chance {
    fn of(state: u64, seed: u64) -> Self {
        match state {
            0 => Chance::Everything,
            1 => Chance::Nothing,
            _ => Chance::Random((seed * STATES + state) * 2 + 1),
        }
    }

    /// splitmix64
    fn draw(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn kept(&mut self) -> bool {
        match self {
            Chance::Everything => true,
            Chance::Nothing => false,
            Chance::Random(state) => Self::draw(state).is_multiple_of(2),
        }
    }

    fn of_a_write(&mut self) -> Write {
        match self {
            Chance::Everything => Write::Whole,
            Chance::Nothing => Write::Torn(0.0),
            Chance::Random(state) => match Self::draw(state) % 5 {
                0 | 1 => Write::Whole,
                2 => Write::Torn((Self::draw(state) % 1000) as f64 / 1000.0),
                3 => Write::Zeros,
                _ => Write::Stale,
            },
        }
    }
}

/// A file system below `root` whose power is cut at the n-th change: that one may happen or not, and nothing after it.
#[derive(Debug, Clone)]
struct Fragile {
    root: PathBuf,
    /// Whether two folders can be exchanged in one step.
    exchanges: bool,
    model: Arc<Mutex<Model>>,
}

fn power_cut() -> io::Error {
    io::Error::other("power cut")
}

fn refused() -> io::Error {
    io::Error::other("input/output error")
}

impl Fragile {
    fn new(root: &Path, exchanges: bool) -> Self {
        let model = Model { left: usize::MAX, fault: Fault::PowerCut, nodes: vec![folder()] };
        Self { root: root.to_owned(), exchanges, model: Arc::new(Mutex::new(model)) }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    fn fail_after(&self, left: usize, fault: Fault) {
        let mut model = self.model();
        (model.left, model.fault) = (left, fault);
    }

    fn inside<'p>(&self, path: &'p Path) -> &'p Path {
        path.strip_prefix(&self.root).unwrap()
    }

    /// Makes the change on its way, and does the work unless the power is cut in it. `None`: cut before it.
    fn change(&self, on_its_way: impl FnOnce(&mut Model)) -> io::Result<()> {
        let mut model = self.model();
        if model.left == 0 {
            return Err(power_cut());
        }
        model.left -= 1;
        if model.left == 0 && model.fault == Fault::Refusal {
            model.left = usize::MAX;
            return Err(refused());
        }
        on_its_way(&mut model);
        if model.left == 0 { Err(power_cut()) } else { Ok(()) }
    }
}

impl FileSystem for Fragile {
    fn create_folders(&self, path: &Path) -> io::Result<()> {
        let inside = self.inside(path);
        let mut missing: Vec<&Path> =
            inside.ancestors().filter(|path| self.model().find(path).is_none()).collect();
        missing.reverse();
        if missing.is_empty() {
            return Ok(());
        }
        self.change(|model| missing.iter().for_each(|path| _ = model.add(path, folder())))?;
        LocalDisk.create_folders(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let mut node = 0;
        let file = Content::File { on_disk: Vec::new(), pending: Vec::new() };
        self.change(|model| node = model.add(self.inside(path), file))?;
        Ok(Box::new(FragileFile { disk: self.clone(), node, file: LocalDisk.create(path)? }))
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.change(|_| ())?;
        LocalDisk.sync_folder(path)?;
        let mut model = self.model();
        let node = model.find(self.inside(path)).unwrap();
        let names = model.names(node);
        model.nodes[node] = Content::Folder { on_disk: names, pending: Vec::new() };
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|model| {
            let node = model.find(self.inside(from)).unwrap();
            let ((parent, from), (other, to)) =
                (model.place(self.inside(from)), model.place(self.inside(to)));
            assert_eq!(parent, other, "only a rename within one folder is atomic everywhere");
            model.change(parent, Change::Rename(from, to, node));
        })?;
        LocalDisk.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        if !self.exchanges {
            return Ok(false);
        }
        self.change(|model| {
            let (a, b) = (self.inside(a), self.inside(b));
            let (node_a, node_b) = (model.find(a).unwrap(), model.find(b).unwrap());
            let ((parent, a), (_, b)) = (model.place(a), model.place(b));
            model.change(parent, Change::Exchange(a, node_a, b, node_b));
        })?;
        LocalDisk.exchange(a, b)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.change(|model| {
            let Some(node) = model.find(self.inside(path)) else { return };
            model.remove_all(node);
            let (parent, name) = model.place(self.inside(path));
            model.change(parent, Change::Remove(name));
        })?;
        LocalDisk.remove_folder(path)
    }
}

struct FragileFile {
    disk: Fragile,
    node: Node,
    file: Box<dyn NewFile>,
}

impl NewFile for FragileFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.change(|model| {
            let Content::File { pending, .. } = &mut model.nodes[self.node] else { panic!("no file") };
            pending.push(bytes.to_vec());
        })?;
        self.file.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.change(|_| ())?;
        self.file.sync()?;
        let mut model = self.disk.model();
        let Content::File { on_disk, pending } = &mut model.nodes[self.node] else { panic!("no file") };
        on_disk.extend(pending.drain(..).flatten());
        Ok(())
    }
}

fn meta(step: u64) -> Meta {
    Meta {
        step,
        epoch: 0,
        world_size: 2,
        plan_hash: "p".into(),
        plan_toml: String::new(),
        data_digest: "d".into(),
        mentee_version: "0.1.0".into(),
        counts: mentee_checkpoint::Counts::default(),
    }
}

/// Two ranks write a checkpoint whose bytes are all `value`; the first commits it.
fn write(disk: &dyn FileSystem, folder: &Path, step: u64, value: u8) -> Result<Committed, CheckpointError> {
    let (bytes, attempt) = (vec![value; (1 << 20) + 5], format!("attempt-{value}"));
    let shares = [
        vec![Tensor::new("student.w", Dtype::U8, &[bytes.len()], &bytes)],
        vec![Tensor::new("teacher.w", Dtype::U8, &[3], &bytes[..3])],
    ];
    let mut files = Vec::new();
    for (rank, tensors) in shares.iter().enumerate() {
        let staging = Staging::open(disk, folder, step, &attempt)?;
        match staging.write(&file_name(rank as u32, 2), tensors) {
            Ok(entry) => files.push(entry),
            Err(error) => {
                staging.abandon();
                return Err(error);
            }
        }
    }
    Staging::open(disk, folder, step, &attempt)?.commit(&meta(step), files)
}

/// Step and value of the newest usable checkpoint.
fn newest_value(folder: &Path) -> Option<(u64, u8)> {
    newest(folder).unwrap().map(|found| (found.checkpoint.manifest.meta.step, value(&found.checkpoint)))
}

fn value(checkpoint: &Checkpoint) -> u8 {
    let state = checkpoint.load().unwrap();
    assert_eq!(state.len(), 2);
    let value = state["teacher.w"].bytes()[0];
    assert!(state.values().all(|tensor| tensor.bytes().iter().all(|byte| *byte == value)));
    value
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Steps and values of all checkpoints; panics when one of them is damaged.
fn all(folder: &Path) -> Vec<(u64, u8)> {
    let load = |entry: mentee_checkpoint::Entry| {
        let manifest = entry.state.unwrap_or_else(|error| panic!("a harmed checkpoint: {error}"));
        (entry.step, value(&Checkpoint { folder: entry.path, manifest }))
    };
    list(folder).unwrap().into_iter().map(load).collect()
}

/// Cuts `work` at every change. `before` makes what is safely on the disk; `check` is told what `work` said and looks at
/// a folder as the cut may have left it.
fn cut_everywhere<T>(
    exchanges: bool,
    before: impl Fn(&dyn FileSystem, &Path),
    work: impl Fn(&dyn FileSystem, &Path) -> T,
    is_done: impl Fn(&T) -> bool,
    check: impl Fn(&T, &Path),
) -> usize {
    for cut in 1.. {
        let (run, left) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let disk = Fragile::new(run.path(), exchanges);
        let checkpoints = run.path().join("checkpoints");
        before(&disk, &checkpoints);
        disk.fail_after(cut, Fault::PowerCut);
        let said = work(&disk, &checkpoints);
        let model = disk.model();
        for state in 0..STATES {
            let root = left.path().join(state.to_string());
            model.lay_out(0, &root, &mut Chance::of(state, cut as u64));
            check(&said, &root.join("checkpoints"));
            fs::remove_dir_all(root).unwrap();
        }
        if model.left > 0 {
            assert!(is_done(&said));
            return cut - 1;
        }
    }
    unreachable!()
}

#[test]
fn a_new_checkpoint_is_there_or_not_and_the_older_stay() {
    let cuts = cut_everywhere(
        true,
        |disk, folder| {
            write(disk, folder, 10, 1).unwrap();
            write(disk, folder, 20, 2).unwrap();
        },
        |disk, folder| {
            let written = write(disk, folder, 30, 3).map(drop);
            (written.is_ok(), written.and_then(|()| retain(disk, folder, 2)).is_ok())
        },
        |&(written, retained)| written && retained,
        |&(written, retained), folder| {
            let found = all(folder);
            assert!(found.contains(&(20, 2)), "{found:?}");
            assert!(found.contains(&(10, 1)) || written, "{found:?}");
            assert!(found.contains(&(30, 3)) || !written, "{found:?}");
            assert!(!found.contains(&(10, 1)) || !retained, "{found:?}");
            assert_eq!(newest_value(folder), found.last().copied());
            // Nothing that the crash left is in the way of the next attempt, or stays.
            clean(&LocalDisk, folder).unwrap();
            write(&LocalDisk, folder, 30, 4).unwrap();
            retain(&LocalDisk, folder, 2).unwrap();
            assert_eq!(names(folder), ["step-00000020", "step-00000030"]);
            assert_eq!(newest_value(folder), Some((30, 4)));
        },
    );
    // The folder; files of 6 and 5 changes (create, header, one part a MiB, sync, sync of the folder); the manifest, 3;
    // sync, rename, sync. Retention: rename, sync, remove.
    assert_eq!(cuts, 1 + 6 + 5 + 3 + 3 + 3);
}

#[test]
fn the_first_checkpoint_is_there_or_not() {
    let nothing = |_: &dyn FileSystem, folder: &Path| fs::create_dir_all(folder.parent().unwrap()).unwrap();
    let work = |disk: &dyn FileSystem, folder: &Path| write(disk, folder, 10, 1).is_ok();
    let check = |done: &bool, folder: &Path| {
        let found = newest_value(folder);
        assert!(found == Some((10, 1)) || (!done && found.is_none()), "{found:?}");
    };
    assert_eq!(cut_everywhere(true, nothing, work, |done| *done, check), 2 + 1 + 6 + 5 + 3 + 3);
}

#[test]
fn a_replaced_checkpoint_is_the_old_or_the_new_one() {
    for exchanges in [true, false] {
        let before = |disk: &dyn FileSystem, folder: &Path| drop(write(disk, folder, 20, 1).unwrap());
        let work = |disk: &dyn FileSystem, folder: &Path| write(disk, folder, 20, 2).is_ok();
        let check = |done: &bool, folder: &Path| {
            let found = all(folder);
            assert!(found == [(20, 2)] || (!done && found == [(20, 1)]), "{found:?}");
            let newest = found[0].1;
            clean(&LocalDisk, folder).unwrap();
            assert_eq!(newest_value(folder), Some((20, newest)));
            assert_eq!(names(folder), ["step-00000020"]);
        };
        let cuts = cut_everywhere(exchanges, before, work, |_| true, check);
        assert!(cuts > 15, "{cuts}");
    }
}

/// The disk refuses one change, work and the next start go on after it, and then the power is cut.
fn refuse_everywhere(
    exchanges: bool,
    before: impl Fn(&dyn FileSystem, &Path),
    work: impl Fn(&dyn FileSystem, &Path) -> bool,
    check: impl Fn(bool, &Path),
) {
    for refused in 1.. {
        for restarts in [false, true] {
            let (run, left) = (TempDir::new().unwrap(), TempDir::new().unwrap());
            let disk = Fragile::new(run.path(), exchanges);
            let checkpoints = run.path().join("checkpoints");
            before(&disk, &checkpoints);
            disk.fail_after(refused, Fault::Refusal);
            let done = work(&disk, &checkpoints);
            if disk.model().left < usize::MAX / 2 {
                assert!(done && refused > 5, "nothing was refused");
                return;
            }
            if restarts {
                clean(&disk, &checkpoints).unwrap();
            }
            let model = disk.model();
            for state in 0..STATES {
                let root = left.path().join(state.to_string());
                model.lay_out(0, &root, &mut Chance::of(state, refused as u64));
                check(done, &root.join("checkpoints"));
                fs::remove_dir_all(root).unwrap();
            }
        }
    }
}

#[test]
fn a_refused_change_costs_no_checkpoint_that_was_there() {
    for exchanges in [true, false] {
        let before = |disk: &dyn FileSystem, folder: &Path| drop(write(disk, folder, 20, 1).unwrap());
        let once = |disk: &dyn FileSystem, folder: &Path| write(disk, folder, 20, 2).is_ok();
        refuse_everywhere(exchanges, before, once, |done, folder| {
            let found = all(folder);
            assert!(found == [(20, 2)] || (!done && found == [(20, 1)]), "{found:?}");
        });
        let again = |disk: &dyn FileSystem, folder: &Path| {
            // A second attempt over what the first has left.
            let first = once(disk, folder);
            write(disk, folder, 20, 3).is_ok() && first
        };
        refuse_everywhere(exchanges, before, again, |done, folder| {
            let found = all(folder);
            assert!(found == [(20, 3)] || (!done && matches!(found[..], [(20, 1 | 2)])), "{found:?}");
        });
    }
    let before = |disk: &dyn FileSystem, folder: &Path| {
        for (step, value) in [(10, 1), (20, 2), (30, 3)] {
            write(disk, folder, step, value).unwrap();
        }
    };
    let work = |disk: &dyn FileSystem, folder: &Path| {
        // The last time over what one before has left.
        let retained = [3, 2, 1].map(|keep| retain(disk, folder, keep).is_ok());
        let written = write(disk, folder, 20, 4).is_ok();
        retain(disk, folder, 1).is_ok() && written && retained == [true; 3]
    };
    refuse_everywhere(true, before, work, |_, folder| {
        let found = all(folder);
        assert!(found.contains(&(30, 3)), "{found:?}");
    });
}

/// Refuses the n-th change for lack of room, and no other.
#[derive(Debug, Clone)]
struct Full(Arc<Mutex<usize>>);

impl Full {
    fn room(&self) -> io::Result<()> {
        let mut left = self.0.lock().unwrap();
        *left = left.wrapping_sub(1);
        if *left == usize::MAX { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl FileSystem for Full {
    fn create_folders(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() { Ok(()) } else { self.room().and_then(|()| LocalDisk.create_folders(path)) }
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        self.room()?;
        Ok(Box::new(FullFile(self.clone(), LocalDisk.create(path)?)))
    }
    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.room().and_then(|()| LocalDisk.sync_folder(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.room().and_then(|()| LocalDisk.rename(from, to))
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        self.room().and_then(|()| LocalDisk.exchange(a, b))
    }
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_folder(path) // gives room
    }
}

struct FullFile(Full, Box<dyn NewFile>);

impl NewFile for FullFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.0.room() {
            // As a disk does: what fits is written.
            self.1.write(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        self.1.write(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.room().and_then(|()| self.1.sync())
    }
}

#[test]
fn a_full_disk_is_named_and_leaves_the_older_checkpoints_and_nothing_else() {
    let run = TempDir::new().unwrap();
    write(&LocalDisk, run.path(), 10, 1).unwrap();
    let mut failures = 0;
    for left in 0.. {
        let disk = Full(Arc::new(Mutex::new(left)));
        let result = write(&disk, run.path(), 20, 2);
        assert_eq!(all(run.path())[0], (10, 1));
        match result {
            Ok(_) => break,
            Err(error) => {
                failures += 1;
                assert!(error.is_no_room(), "{error}");
                // The last change is the sync after the rename: the checkpoint is there and may not survive a power cut.
                let there = names(run.path());
                assert!(there == ["step-00000010"] || there.len() == 2, "{left}: {there:?}");
                let _ = fs::remove_dir_all(run.path().join("step-00000020"));
            }
        }
    }
    assert!(failures >= 15, "{failures}");
    assert_eq!(newest_value(run.path()), Some((20, 2)));
}

#[test]
fn another_cause_is_not_taken_for_a_full_disk() {
    let error = CheckpointError::Io {
        action: "write",
        path: "x".into(),
        source: io::Error::from(io::ErrorKind::PermissionDenied),
    };
    assert!(!error.is_no_room());
}
