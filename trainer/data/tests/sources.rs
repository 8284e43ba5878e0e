//! Formats on disk, from literal bytes; what is wrong in them is named.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use common::{Memory, jpeg, noise, rgb_png};
use mentee_config::recipe::DataFormat;
use mentee_data::decode::Reading;
use mentee_data::shard::write_shards;
use mentee_data::{DataError, Encoding, Source, Split, check, open, open_split, with_classes_of};
use tempfile::TempDir;

fn put(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn error(path: &Path, format: DataFormat) -> String {
    let message = open(path, format).err().expect("refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(&path.display().to_string(), "DIR")
}

fn labels(source: &dyn Source) -> Vec<Option<u32>> {
    (0..source.len()).map(|i| source.label(i)).collect()
}

// --- image folder ---------------------------------------------------------------------------------------------

#[test]
fn image_folder() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "dog/b.JPG", &jpeg(8, 8, false, jpeg_encoder::ColorType::Rgb));
    put(root, "dog/a.png", &rgb_png(3, 3, 1));
    put(root, "cat/deep/er/z.jpeg", &jpeg(8, 8, false, jpeg_encoder::ColorType::Rgb));
    put(root, "cat/notes.txt", b"no image");
    put(root, "cat/.hidden.png", b"no image");
    put(root, "empty/readme.md", b"a folder without images is no class");
    put(root, ".git/x.png", b"no image");
    let source = open(root, DataFormat::Auto).unwrap();
    assert_eq!(source.classes(), ["cat", "dog"]);
    assert_eq!(labels(&*source), [Some(0), Some(1), Some(1)]);
    let keys: Vec<String> =
        (0..3).map(|i| source.key(i).replace(&root.display().to_string(), "DIR")).collect();
    assert_eq!(keys, ["DIR/cat/deep/er/z.jpeg", "DIR/dog/a.png", "DIR/dog/b.JPG"]);
    let sample = source.read(1).unwrap();
    assert_eq!((sample.encoding, sample.bytes), (Encoding::File, rgb_png(3, 3, 1)));

    let digest = source.digest();
    assert_eq!(open(root, DataFormat::Folder).unwrap().digest(), digest);
    put(root, "dog/c.png", &rgb_png(3, 3, 2));
    assert_ne!(open(root, DataFormat::Auto).unwrap().digest(), digest);
    fs::remove_file(root.join("dog/a.png")).unwrap();
    assert!(
        matches!(source.read(1), Err(DataError::Io { action: "read", path, .. }) if path.ends_with("dog/a.png"))
    );
}

#[test]
fn what_is_passed_over_is_said() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let said = |source: &dyn Source| {
        source.passed_over().map(|line| line.replace(&root.display().to_string(), "DIR"))
    };
    put(root, "cat/x.ppm", b"not looked at");
    put(root, "dog/x.webp", b"not looked at");
    put(root, "dog/.hidden.nii", b"");
    put(root, ".cache/x.nii", b"");
    let whole = open(root, DataFormat::Auto).unwrap();
    assert_eq!((whole.len(), said(&*whole)), (2, None));
    put(root, "cat/deep/a.nii", b"");
    put(root, "cat/b.NII", b"");
    put(root, "dog/left.tar", b"");
    put(root, "empty/c.dcm", b"");
    put(root, "README", b"");
    put(root, "labels.csv", b"");
    put(root, "IM.0017", b"");
    let source = open(root, DataFormat::Auto).unwrap();
    let line = "passed over in DIR: 2 .nii, 1 without extension, 1 .dcm, 1 .tar (read are JPEG, PNG, WebP, TIFF, BMP, PPM and PGM)";
    assert_eq!(said(&*source).as_deref(), Some(line));
    assert_eq!(source.digest(), whole.digest(), "they are no part of the set");
    let held_out = with_classes_of(&*whole, source).unwrap();
    assert_eq!(said(&*held_out).as_deref(), Some(line));
    assert_eq!(check::verify(root, DataFormat::Auto, 1, &|_, _| ()).unwrap().notes.len(), 1);

    // And where there is nothing else, what there is.
    fs::remove_file(root.join("cat/x.ppm")).unwrap();
    fs::remove_file(root.join("dog/x.webp")).unwrap();
    fs::remove_file(root.join("dog/left.tar")).unwrap();
    let nothing = |advice: &str, seen: &str| {
        format!(
            "no image found in `DIR`, but {seen}: looked for tar shards (*.tar), CIFAR binary (data_batch_1.bin), IDX \
             (train-images-idx3-ubyte), images (*.jpg, *.jpeg, *.png, *.webp, *.tif, *.tiff, *.bmp, *.ppm, *.pgm) in class folders or at the top: {advice}"
        )
    };
    assert_eq!(
        error(root, DataFormat::Auto),
        nothing("convert images of other formats first", "2 .nii, 1 without extension, 1 .dcm")
    );
    put(root, "images.tar.gz", b"");
    assert_eq!(
        error(root, DataFormat::Auto),
        nothing("unpack archives first", "2 .nii, 1 without extension, 1 .dcm, 1 .tar.gz")
    );
    let mut tar = Vec::new();
    member(&mut tar, "a.nii", b"", b'0');
    member(&mut tar, "a.cls", b"1", b'0');
    put(root, "set/a.tar", &tar);
    assert_eq!(
        error(&root.join("set"), DataFormat::Auto),
        "no image found in `DIR`, but members 1 .nii: looked for *.tar with members named KEY.jpg, KEY.jpeg, KEY.png, \
         KEY.webp, KEY.tif, KEY.tiff, KEY.bmp, KEY.ppm, KEY.pgm; a KEY ends at the first dot"
    );
    for name in ["b.bmp", "b.tif", "b.json", "slide.r1.tif", "._b.tif", "deep/.x/c.nii"] {
        member(&mut tar, name, b"not looked at", b'0');
    }
    put(root, "set/a.tar", &tar);
    let source = open(&root.join("set"), DataFormat::Auto).unwrap();
    assert_eq!(source.len(), 1);
    assert_eq!(
        said(&*source).unwrap(),
        "passed over in DIR/set: members 2 .tif, 1 .nii (read are a KEY's first image (KEY.jpg and so on) and its KEY.cls; a KEY \
         ends at the first dot)"
    );
}

#[test]
fn runs_among_the_images_are_no_classes() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "cat/x.png", &rgb_png(3, 3, 1));
    let before = open(root, DataFormat::Auto).unwrap();
    for run in ["run", "runs/first", "cat/run"] {
        put(root, &format!("{run}/plan.toml"), b"");
        put(root, &format!("{run}/views.png"), &rgb_png(3, 3, 2));
    }
    let after = open(root, DataFormat::Auto).unwrap();
    assert_eq!((after.len(), after.classes(), after.digest()), (1, before.classes(), before.digest()));
}

#[test]
fn images_without_classes() {
    let dir = TempDir::new().unwrap();
    put(dir.path(), "b.png", &rgb_png(3, 3, 1));
    put(dir.path(), "a.png", &rgb_png(3, 3, 2));
    let source = open(dir.path(), DataFormat::Auto).unwrap();
    assert_eq!((source.len(), source.classes().len(), source.label(0)), (2, 0, None));
    assert!(source.key(0).ends_with("a.png"));
    put(dir.path(), "class/a.png", &rgb_png(3, 3, 3));
    assert_eq!(
        error(dir.path(), DataFormat::Auto),
        "`DIR`: 2 images beside 1 class folder: move them into a class folder or away"
    );
}

#[test]
fn values_of_deep_images_are_told() {
    use png::{BitDepth, ColorType};
    let dir = TempDir::new().unwrap();
    let grey = |values: [u16; 2]| {
        common::png(2, 1, ColorType::Grayscale, BitDepth::Sixteen, &values.map(u16::to_be_bytes).concat())
    };
    let notes = || check::stats(dir.path(), DataFormat::Auto, Reading::default(), 2).unwrap().remove(0).notes;
    put(dir.path(), "light.png", &rgb_png(3, 3, 1));
    put(dir.path(), "a.png", &grey([0, 4095]));
    put(dir.path(), "b.png", &grey([0, 7]));
    let told = "images of more than 8 bits (2 of those decoded): values from 0 to 4095, 98 % of them from 0 to 4095; ";
    let unless = "their high byte is kept, unless `mentee shard` is told otherwise (--range LOW:HIGH)";
    assert_eq!(notes(), [format!("{told}{unless}")]);
    let reading = Reading { range: Some([0.0, 4095.0]), bands: None };
    let stats = check::stats(dir.path(), DataFormat::Auto, reading, 2).unwrap().remove(0);
    assert_eq!(stats.notes, [format!("{told}0 to 4095 are taken as 0 to 255 (--range)")]);
    // What cannot be read for want of a range is said with its values.
    let float = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/deep/float64.tif");
    fs::copy(float, dir.path().join("c.tif")).unwrap();
    let error = check::stats(dir.path(), DataFormat::Auto, Reading::default(), 1).unwrap_err().to_string();
    assert!(
        error.contains("(--range LOW:HIGH); values from -0.0") && error.contains(" % of them from "),
        "{error}"
    );
    // A dark image of 8 bits loses nothing.
    let dir = TempDir::new().unwrap();
    put(dir.path(), "a.png", &common::png(2, 1, ColorType::Grayscale, BitDepth::Eight, &[0, 3]));
    assert!(check::stats(dir.path(), DataFormat::Auto, Reading::default(), 1).unwrap()[0].notes.is_empty());
}

#[test]
fn a_name_makes_no_image() {
    // A folder is a folder, whatever it is called.
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "cat/x.png", &rgb_png(3, 3, 1));
    put(root, "cat/dir.jpg/y.png", &rgb_png(3, 3, 2));
    put(root, "dog.png/z.png", &rgb_png(3, 3, 3));
    let source = open(root, DataFormat::Auto).unwrap();
    assert_eq!((source.classes(), source.len()), (&["cat".to_owned(), "dog.png".to_owned()][..], 3));
    put(root, "left.tar", b"");
    fs::remove_file(root.join("cat/x.png")).unwrap();
    assert!(error(root, DataFormat::Auto).contains("beside images (`cat/dir.jpg/y.png`)"));
    fs::remove_file(root.join("left.tar")).unwrap();

    // What could be waited for for ever is refused, in a class and beside none; under another name it is nothing.
    let socket = |name: &str| drop(std::os::unix::net::UnixListener::bind(root.join(name)).unwrap());
    socket("cat/control");
    assert_eq!(open(root, DataFormat::Auto).unwrap().len(), 2);
    socket("cat/s.jpg");
    let refused = "a socket, named like an image: remove it or give it another name";
    assert_eq!(error(root, DataFormat::Auto), format!("`DIR/cat/s.jpg`: {refused}"));
    let flat = TempDir::new().unwrap();
    let pipe = flat.path().join("p.webp");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(
        error(flat.path(), DataFormat::Auto),
        "`DIR/p.webp`: a named pipe, named like an image: remove it or give it another name"
    );
}

#[test]
fn names_that_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let named = |bytes: &[u8]| root.join(std::ffi::OsStr::from_bytes(bytes));
    put(root, "cat/x.png", &rgb_png(3, 3, 1));
    // Of what is no image they are nobody's business.
    fs::write(named(b"cat/caf\xe9.txt"), b"no image").unwrap();
    fs::write(named(b"\xff"), b"no image").unwrap();
    fs::create_dir(named(b".hidden\xff")).unwrap();
    assert_eq!(open(root, DataFormat::Auto).unwrap().len(), 1);
    // Of an image or a folder they are told so that they can be found.
    fs::write(named(b"cat/caf\xe9\xc3\xa9\n.JPG"), b"").unwrap();
    assert_eq!(
        error(root, DataFormat::Auto),
        "`DIR/cat/caf\\xe9\u{e9}\\n.JPG`: the name is not UTF-8: rename it"
    );
    fs::create_dir(named(b"a\xff")).unwrap();
    assert_eq!(error(root, DataFormat::Auto), "`DIR/a\\xff`: the name is not UTF-8: rename it");
}

#[test]
fn a_link_that_leads_nowhere_is_an_error() {
    for (name, target) in [("cat", "nowhere"), ("dog/z.jpg", "nowhere"), ("dog/deep", "deep")] {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        put(root, "dog/a.png", &rgb_png(3, 3, 1));
        std::os::unix::fs::symlink(target, root.join(name)).unwrap();
        let message = error(root, DataFormat::Auto);
        assert!(message.starts_with(&format!("`DIR/{name}`: a link to `{target}`, which")), "{message}");
        assert!(message.ends_with("restore what it leads to, or remove the link"), "{message}");
    }
    // One that leads somewhere is what it leads to.
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "elsewhere/x/a.png", &rgb_png(3, 3, 1));
    fs::create_dir(root.join("set")).unwrap();
    std::os::unix::fs::symlink("../elsewhere/x", root.join("set/cat")).unwrap();
    // One that leads nowhere, named as a file that is none of ours, is passed over as one.
    std::os::unix::fs::symlink("../annex/labels.csv", root.join("set/labels.csv")).unwrap();
    assert_eq!(open(&root.join("set"), DataFormat::Auto).unwrap().classes(), ["cat"]);
}

#[test]
fn tar_files_beside_images_are_refused_until_the_format_is_named() {
    let mut tar = Vec::new();
    member(&mut tar, "a.png", &rgb_png(4, 4, 1), b'0');
    for (image, labelled) in [("cat/deep/z.png", true), ("z.png", false)] {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        put(root, image, &rgb_png(3, 3, 1));
        put(root, "notes/readme.txt", b"no image");
        put(root, ".cache/x.png", b"no image");
        put(root, "left.tar", &tar);
        assert_eq!(
            error(root, DataFormat::Auto),
            format!(
                "`DIR`: tar files (`left.tar`) beside images (`{image}`): say which are meant with data.format \
                 (--format of a command), \"tar\" or \"folder\", or move the others away"
            )
        );
        let folder = open(root, DataFormat::Folder).unwrap();
        assert_eq!((folder.len(), folder.label(0).is_some()), (1, labelled));
        assert!(open(root, DataFormat::Tar).unwrap().key(0).ends_with("left.tar:a"));
        fs::remove_file(root.join(image)).unwrap();
        assert_eq!(open(root, DataFormat::Auto).unwrap().len(), 1, "tar files alone");
    }
}

#[test]
fn an_index_of_another_program_makes_no_shards() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "cat/x.png", &rgb_png(3, 3, 1));
    for theirs in [&b"{\"version\": 1, \"shards\": []}"[..], b"[1, 2]", b"no JSON"] {
        put(root, "index.json", theirs);
        assert_eq!(open(root, DataFormat::Auto).unwrap().classes(), ["cat"]);
    }
    // Ours decides, also beside images and without its shards.
    put(root, "index.json", b"{\"format\":\"mentee-shards\",\"version\":1,\"classes\":[");
    assert!(error(root, DataFormat::Auto).starts_with("`DIR/index.json`: not an index of shards"));
}

#[test]
fn nothing_to_open() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("nowhere");
    let found = open(&missing, DataFormat::Auto).err().unwrap();
    assert_eq!(
        found.to_string(),
        format!(
            "data.path: no such folder `{}`: give a folder of tar shards, a folder of images, or one with CIFAR \
             binary or IDX files",
            missing.display()
        )
    );
    assert!(found.with_key("eval.path").to_string().starts_with("eval.path: no such folder"));
    assert!(open_split(&missing, DataFormat::Auto, Split::Eval).is_err());
    assert!(
        error(dir.path(), DataFormat::Auto).starts_with("no image found in `DIR`: looked for tar shards")
    );
    assert_eq!(
        error(dir.path(), DataFormat::Cifar),
        "no image found in `DIR`: looked for data_batch_*.bin or train.bin"
    );
    assert!(
        error(dir.path(), DataFormat::Idx).starts_with("no image found in `DIR`: looked for train-images")
    );
    assert!(error(dir.path(), DataFormat::Tar).starts_with("no image found in `DIR`: looked for *.tar"));
}

#[test]
fn divided_sets() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let count = |path: &Path, split| open_split(path, DataFormat::Auto, split).unwrap().map(|s| s.len());
    // A class may be called "train".
    put(root, "a/train/x.png", &rgb_png(3, 3, 1));
    put(root, "a/plane/x.png", &rgb_png(3, 3, 1));
    assert_eq!((count(&root.join("a"), Split::Train), count(&root.join("a"), Split::Eval)), (Some(2), None));
    for held_out in ["test", "val", "valid", "validation"] {
        let set = root.join(held_out).join("set");
        put(&set, "train/c/x.png", &rgb_png(3, 3, 1));
        assert_eq!((count(&set, Split::Train), count(&set, Split::Eval)), (Some(1), None), "train alone");
        put(&set, "train/d/x.png", &rgb_png(3, 3, 1));
        put(&set, &format!("{held_out}/c/x.png"), &rgb_png(3, 3, 1));
        assert_eq!((count(&set, Split::Train), count(&set, Split::Eval)), (Some(2), Some(1)));
        let train = set.join("train");
        assert_eq!(
            (count(&train, Split::Train), count(&train, Split::Eval)),
            (Some(2), Some(1)),
            "beside it"
        );
    }
    // One that may stand for both: the first name.
    let set = root.join("test/set");
    put(&set, "valid/c/y.png", &rgb_png(3, 3, 1));
    put(&set, "valid/c/z.png", &rgb_png(3, 3, 1));
    assert_eq!(count(&set, Split::Eval), Some(1));
}

#[test]
fn parts_of_a_set_by_other_names() {
    let image = rgb_png(3, 3, 1);
    let dir = TempDir::new().unwrap();
    let count = |path: &Path, split| open_split(path, DataFormat::Auto, split).unwrap().map(|s| s.len());
    for (train, held_out) in [
        ("Train", "Val"),
        ("TRAIN", "test"),
        ("train", "testing"),
        ("training", "testing"),
        ("Training", "Validation"),
    ] {
        let set = dir.path().join(format!("{train}-{held_out}"));
        put(&set, &format!("{train}/a/x.png"), &image);
        put(&set, &format!("{train}/b/x.png"), &image);
        assert_eq!((count(&set, Split::Train), count(&set, Split::Eval)), (Some(2), None), "{train} alone");
        put(&set, &format!("{held_out}/a/x.png"), &image);
        for path in [&set, &set.join(train)] {
            assert_eq!((count(path, Split::Train), count(path, Split::Eval)), (Some(2), Some(1)), "{path:?}");
        }
        assert_eq!(check::stats(&set, DataFormat::Auto, Reading::default(), 1).unwrap().len(), 2);
    }
    // The name as it is written first, whatever else is there.
    let set = dir.path().join("both");
    put(&set, "train/a/x.png", &image);
    put(&set, "VAL/a/x.png", &image);
    put(&set, "val/a/x.png", &image);
    put(&set, "val/a/y.png", &image);
    assert_eq!(count(&set, Split::Eval), Some(2));
    assert_eq!(mentee_data::more_held_out(&set), [set.join("VAL")]);
    // A part that cannot be reached is not left out.
    let set = dir.path().join("link");
    put(&set, "train/a/x.png", &image);
    std::os::unix::fs::symlink("nowhere", set.join("test")).unwrap();
    for split in [Split::Train, Split::Eval] {
        let refused = open_split(&set, DataFormat::Auto, split).err().unwrap().to_string();
        assert!(refused.contains("/test`: a link to `nowhere`"), "{refused}");
    }
}

#[test]
fn parts_of_a_set_are_no_classes() {
    let made = |names: &[&str]| {
        let dir = TempDir::new().unwrap();
        names.iter().for_each(|name| put(dir.path(), &format!("{name}/x.png"), &rgb_png(3, 3, 1)));
        dir
    };
    let refused = |names: &[&str]| {
        let dir = made(names);
        let message =
            open_split(dir.path(), DataFormat::Auto, Split::Train).err().expect("refused").to_string();
        assert!(check::verify(dir.path(), DataFormat::Auto, 1, &|_, _| ()).is_err(), "{names:?}");
        message.replace(&dir.path().display().to_string(), "DIR")
    };
    assert_eq!(
        refused(&["train2017/a", "val2017/a", "other"]),
        "`DIR`: `train2017` and `val2017` are named like parts of a set and would be classes: name the parts as is understood \
         (`train` or `training`, beside `test`, `testing`, `val`, `valid` or `validation`) or give the one to train on; classes \
         need other names"
    );
    assert!(refused(&["test/a", "Val/a"]).starts_with("`DIR`: `Val` and `test` are named like parts"));
    assert!(refused(&["train/a", "dev/a"]).starts_with("`DIR`: `dev` and `train` are named like parts"));
    assert_eq!(
        refused(&["val/a", "val/b"]),
        "`DIR`: its only folder with images, `val`, is named like a part of a set and would be a class: give `DIR/val`"
    );
    assert_eq!(
        refused(&["mydata/train/a", "mydata/val/a"]),
        "`DIR`: its only folder with images, `mydata`, holds a divided set (`train` and `val`) and would be one class: give \
         `DIR/mydata`"
    );
    assert!(
        refused(&["images/train2017", "images/val2017"]).ends_with("would be one class: give `DIR/images`")
    );
    assert!(refused(&["mydata/Training/a", "mydata/Training/b"]).contains("a divided set (`Training`)"));
    // Archives that unpack to a folder of their own name.
    assert!(refused(&["train/train"]).ends_with("give `DIR/train/train`"));

    // A class may have such a name.
    for names in [
        &["train", "plane", "ship"][..],
        &["Train", "car"],
        &["streetcar", "television", "tractor", "train", "trout"],
        &["cat", "dog", "test"],
        &["train1", "train2"],
        &["retest", "validated"],
        &["mydata", "mydata/train"],
        &["photos/train", "photos/plane"],
    ] {
        let dir = made(names);
        let source = open_split(dir.path(), DataFormat::Auto, Split::Train).unwrap().unwrap();
        assert_eq!(source.len(), names.len() as u64, "{names:?}");
    }
}

#[test]
fn folders_without_images_beside_train_are_no_classes() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    put(root, "train/cat/x.png", &rgb_png(3, 3, 1));
    put(root, "train/dog/x.png", &rgb_png(3, 3, 2));
    put(root, "train/.cache/x.png", b"no image");
    for foreign in [
        ".cache/x.png",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/train/x.png",
        "lost+found/x.png",
        "annotations/deep/boxes.json",
    ] {
        put(root, foreign, b"no image");
        let train = open_split(root, DataFormat::Auto, Split::Train).unwrap().unwrap();
        assert_eq!(train.classes(), ["cat", "dog"], "{foreign}");
        assert!(open_split(root, DataFormat::Auto, Split::Eval).unwrap().is_none());
        assert_eq!(check::stats(root, DataFormat::Auto, Reading::default(), 1).unwrap()[0].classes.len(), 2);
    }
    // Nor are they in a folder of classes.
    put(root, "plane/x.png", &rgb_png(3, 3, 3));
    assert_eq!(open(root, DataFormat::Auto).unwrap().classes(), ["plane", "train"]);
}

/// A folder with an image of each class.
fn classes(root: &Path, names: &[&str]) -> Arc<dyn Source> {
    for name in names {
        put(root, &format!("{name}/x.png"), &rgb_png(3, 3, 1));
    }
    open(root, DataFormat::Auto).unwrap()
}

#[test]
fn held_out_classes_have_the_training_images_numbers() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let train = classes(&root.join("train"), &["a", "b", "c"]);
    let test = classes(&root.join("test"), &["a", "c"]);
    assert_eq!(labels(&*test), [Some(0), Some(1)], "by itself");
    let matched = with_classes_of(&*train, test.clone()).unwrap();
    assert_eq!(labels(&*matched), [Some(0), Some(2)]);
    assert_eq!(matched.classes(), train.classes());
    assert_eq!(
        (matched.len(), matched.key(1), matched.digest(), matched.stored(), matched.shards()),
        (test.len(), test.key(1), test.digest(), test.stored(), test.shards())
    );
    assert_eq!(matched.read(1), test.read(1));

    // Shards know the names too, whatever their order.
    let shards = |name: &str, classes: &[&str], labels: &[Option<u32>]| {
        let whole = Memory::noise(labels.len() as u64);
        let set = Memory {
            files: whole.files.clone(),
            labels: labels.to_vec(),
            classes: classes.iter().map(|&class| class.to_owned()).collect(),
        };
        write_shards(&set, &root.join(name), 1 << 20, &mut |_, _| {}).unwrap();
        open(&root.join(name), DataFormat::Auto).unwrap()
    };
    let other = shards("other", &["c", "unused", "a"], &[Some(0), Some(2), None]);
    let matched = with_classes_of(&*train, other.clone()).unwrap();
    assert_eq!(labels(&*matched), [Some(2), Some(0), None], "a name without images is no class to be missed");
    let same = with_classes_of(&*other, other.clone()).unwrap();
    assert_eq!(labels(&*same), labels(&*other));

    let unknown = with_classes_of(&*test, train.clone()).err().unwrap();
    assert_eq!(unknown, DataError::UnknownClass { sample: train.key(1), class: "b".to_owned() });
    assert_eq!(
        unknown.to_string().replace(&root.display().to_string(), "DIR"),
        "sample DIR/train/b/x.png is of class `b`, which the training images do not have: name the classes of both \
         alike, or leave its images out"
    );

    // Numbers may be names, but none that words could be compared with.
    let digits = classes(&root.join("digits"), &["0", "1", "2"]);
    let two = shards("two", &["0", "2"], &[Some(1), Some(0)]);
    assert_eq!(labels(&*with_classes_of(&*digits, two.clone()).unwrap()), [Some(2), Some(0)]);
    assert_eq!(labels(&*with_classes_of(&*train, two.clone()).unwrap()), labels(&*two));
    assert_eq!(labels(&*with_classes_of(&*digits, test.clone()).unwrap()), labels(&*test));

    // Labels without names are numbers, compared as they are.
    let nameless = shards("nameless", &["c"], &[Some(0), Some(1)]);
    fs::create_dir_all(root.join("plain")).unwrap();
    fs::copy(root.join("other/00000.tar"), root.join("plain/00000.tar")).unwrap();
    let plain = open(&root.join("plain"), DataFormat::Auto).unwrap();
    put(&root.join("idx"), "train-images-idx3-ubyte", &IMAGES);
    put(&root.join("idx"), "train-labels-idx1-ubyte", &LABELS);
    let idx = open(&root.join("idx"), DataFormat::Auto).unwrap();
    put(&root.join("cifar"), "test_batch.bin", &record(&[9], [0; 2], [0; 2], [0; 2]));
    let cifar = open(&root.join("cifar"), DataFormat::Auto).unwrap();
    for source in [nameless, plain, idx, cifar] {
        let key = source.key(0);
        assert!(!source.names_classes(), "{key}");
        assert_eq!(labels(&*with_classes_of(&*train, source.clone()).unwrap()), labels(&*source), "{key}");
        assert_eq!(labels(&*with_classes_of(&*source, test.clone()).unwrap()), labels(&*test), "{key}");
    }
}

// --- tar ------------------------------------------------------------------------------------------------------

fn header(name: &[u8], size: &[u8], kind: u8) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name);
    header[124..124 + size.len()].copy_from_slice(size);
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn member(tar: &mut Vec<u8>, name: &str, data: &[u8], kind: u8) {
    tar.extend(header(name.as_bytes(), format!("{:011o}\0", data.len()).as_bytes(), kind));
    tar.extend(data);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

#[test]
fn a_tar_of_others_without_an_index() {
    let dir = TempDir::new().unwrap();
    let image = |seed| rgb_png(4, 4, seed);
    let mut tar = Vec::new();
    member(&mut tar, "set/", b"", b'5');
    // The label may come first; members of other kinds are passed over; dots end the key.
    member(&mut tar, "set/a.cls", b"3\n", b'0');
    member(&mut tar, "set/a.json", b"{}", b'0');
    member(&mut tar, "set/a.png", &image(1), 0);
    member(&mut tar, "set/a.seg.png", b"a mask, not the image", b'0');
    member(&mut tar, "set/text.txt", b"no sample", b'0');
    member(&mut tar, "../../etc/b.PNG", &image(2), b'0');
    member(&mut tar, "../../etc/b.cls", b"0", b'0');
    member(&mut tar, "set/link.png", b"", b'2');
    // GNU's long name.
    let long = format!("{}/c.png", "d".repeat(150));
    member(&mut tar, "././@LongLink", long.as_bytes(), b'L');
    member(&mut tar, "truncated name", &image(3), b'0');
    // pax: a path, and a size that the header's field does not hold.
    let record =
        |text: &str| (1..).map(|n| format!("{n} {text}\n")).find(|r| r.starts_with(&format!("{} ", r.len())));
    let pax = format!(
        "{}{}",
        record("path=e/\u{e9}.jpg").unwrap(),
        record(&format!("size={}", image(4).len())).unwrap()
    );
    member(&mut tar, "PaxHeaders/x", pax.as_bytes(), b'x');
    let wrong_size = header(b"ignored", b"00000000000\0", b'0');
    tar.extend(&wrong_size);
    tar.extend(image(4));
    tar.resize(tar.len().next_multiple_of(512), 0);
    // GNU's base-256 size.
    let mut size = [0u8; 12];
    size[0] = 0x80;
    size[4..].copy_from_slice(&(image(5).len() as u64).to_be_bytes());
    tar.extend(header(b"f.png", &size, b'0'));
    tar.extend(image(5));
    tar.resize(tar.len().next_multiple_of(512), 0);
    tar.extend([0u8; 1024]);
    put(dir.path(), "shard-1.tar", &tar);
    let mut second = Vec::new();
    member(&mut second, "g.png", &image(6), b'0');
    put(dir.path(), "shard-2.tar", &second); // no zero blocks at its end

    let source = open(dir.path(), DataFormat::Auto).unwrap();
    let keys: Vec<String> =
        (0..source.len()).map(|i| source.key(i).replace(&dir.path().display().to_string(), "DIR")).collect();
    let long_key = format!("DIR/shard-1.tar:{}/c", "d".repeat(150));
    assert_eq!(
        keys,
        [
            "DIR/shard-1.tar:set/a",
            "DIR/shard-1.tar:../../etc/b",
            &long_key,
            "DIR/shard-1.tar:e/\u{e9}",
            "DIR/shard-1.tar:f",
            "DIR/shard-2.tar:g"
        ]
    );
    assert_eq!(labels(&*source), [Some(3), Some(0), None, None, None, None]);
    assert_eq!(source.classes(), ["0", "1", "2", "3"]);
    for i in 0..6 {
        assert_eq!(source.read(i).unwrap().bytes, image(i + 1), "{i}");
    }
    assert_eq!(
        open(&dir.path().join("shard-2.tar"), DataFormat::Auto).unwrap().len(),
        1,
        "one file by its path"
    );
    let digest = source.digest();
    put(dir.path(), "shard-3.tar", &second);
    assert_ne!(open(dir.path(), DataFormat::Auto).unwrap().digest(), digest);
}

#[test]
fn a_single_file() {
    let dir = TempDir::new().unwrap();
    let mut tar = Vec::new();
    member(&mut tar, "a.png", &rgb_png(4, 4, 1), b'0');
    for name in ["x.tar", "x.tar.part", "x"] {
        put(dir.path(), name, &tar);
        assert_eq!(open(&dir.path().join(name), DataFormat::Auto).unwrap().len(), 1, "{name}");
    }
    let unpack = "unpack it first and give the folder (a tar file can be given when it is not compressed)";
    for (name, bytes, reason) in [
        (
            "photo.jpg",
            &jpeg(8, 8, false, jpeg_encoder::ColorType::Rgb)[..],
            "a single image: give the folder that it is in",
        ),
        ("x.tar.gz", &[0x1F, 0x8B, 8, 0], &format!("packed (gzip): {unpack}")),
        ("named.tar", &[0x1F, 0x8B, 8, 0], &format!("packed (gzip): {unpack}")),
        ("x.zip", b"PK\x03\x04....", &format!("packed (zip): {unpack}")),
        ("x.tar.xz", b"\xFD7zXZ\0", &format!("packed (xz): {unpack}")),
        ("x.tar.zst", b"\x28\xB5\x2F\xFD", &format!("packed (zstd): {unpack}")),
        ("x.7z", b"7z\xBC\xAF\x27\x1C", &format!("packed (7z): {unpack}")),
        ("labels.csv", b"a,b", "not a tar file: give a folder of images, or a tar file"),
        ("empty", b"", "not a tar file: give a folder of images, or a tar file"),
    ] {
        put(dir.path(), name, bytes);
        let path = dir.path().join(name);
        for format in [DataFormat::Auto, DataFormat::Tar] {
            assert_eq!(error(&path, format), format!("`DIR`: {reason}"), "{name}");
        }
        assert!(check::verify(&path, DataFormat::Auto, 1, &|_, _| ()).is_err(), "{name}");
    }
    // What is called a tar file is read as one, and its damage said.
    put(dir.path(), "bad.tar", &[7; 600]);
    assert!(error(&dir.path().join("bad.tar"), DataFormat::Auto).contains("tar header at byte 0: checksum"));
}

#[test]
fn hostile_tars_are_refused_with_the_place() {
    let dir = TempDir::new().unwrap();
    let refuse = |tar: &[u8], expected: &str| {
        put(dir.path(), "x.tar", tar);
        let message = error(dir.path(), DataFormat::Auto);
        assert!(message.starts_with(&format!("`DIR/x.tar`: {expected}")), "{message}");
    };
    let mut good = Vec::new();
    member(&mut good, "a.png", &rgb_png(4, 4, 1), b'0');
    let first = good.len();
    member(&mut good, "b.png", &rgb_png(4, 4, 2), b'0');

    refuse(&noise(2048, 5), "tar header at byte 0: checksum does not match: damaged, or not a tar file");
    refuse(
        &good[..first + 100],
        &format!("tar header at byte {first}: the file ends within a header: truncated"),
    );
    refuse(&good[..first + 520], &format!("tar header at byte {first}: a member of "));
    let mut changed = good.clone();
    changed[first] ^= 1;
    refuse(&changed, &format!("tar header at byte {first}: checksum does not match"));
    for (size, expected) in [
        (&b"77777777777\0"[..], "a member of 8589934591 bytes"),
        (&[0xFF; 12][..], "unreadable size"),
        (&[0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF][..], "impossible size"),
        (&b"-0000000001\0"[..], "unreadable size"),
    ] {
        refuse(&header(b"a.png", size, b'0'), &format!("tar header at byte 0: {expected}"));
    }
    // A checksum in base 256, in a field shorter than such a number may be (found by the fuzzer).
    let mut short = header(b"a.png", b"00000000000\0", b'0');
    short[148] = 0x80;
    refuse(&short, "tar header at byte 0: checksum does not match");
    let mut name = Vec::new();
    member(&mut name, "././@LongLink", &vec![b'x'; (1 << 20) + 1], b'L');
    refuse(&name, "tar header at byte 0: a name of 1048577 bytes");
    for pax in ["99999 path=a\n", "path=a\n", "7 path\n", "0 a=b\n", "4 a\n\n"] {
        let mut tar = Vec::new();
        member(&mut tar, "x", pax.as_bytes(), b'x');
        member(&mut tar, "a.png", &rgb_png(4, 4, 1), b'0');
        refuse(&tar, "tar header at byte 0: malformed pax header");
    }
    for (label, expected) in [
        ("cat", "label `cat` is not"),
        ("-1", "label `-1` is not"),
        ("1048576", "label `1048576` is not a whole number from 0 to 1048575"),
        ("4294967295", "label `4294967295` is not"),
    ] {
        let mut tar = good.clone();
        member(&mut tar, "b.cls", label.as_bytes(), b'0');
        refuse(&tar, &format!("member b.cls: {expected}"));
    }
    let mut tar = good.clone();
    member(&mut tar, "b.cls", &[b'1'; 33], b'0');
    refuse(&tar, "member b.cls: 33 bytes is no label");
}

// --- CIFAR ----------------------------------------------------------------------------------------------------

/// One record: labels, then planes of which only the first pixels are set.
fn record(labels: &[u8], red: [u8; 2], green: [u8; 2], blue: [u8; 2]) -> Vec<u8> {
    let mut record = labels.to_vec();
    for plane in [red, green, blue] {
        record.extend(plane);
        record.resize(record.len() + 1022, 0);
    }
    record
}

#[test]
fn cifar_10() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let one = record(&[6], [59, 43], [62, 46], [63, 45]);
    let two = record(&[9], [1, 2], [3, 4], [5, 6]);
    put(root, "cifar-10-batches-bin/data_batch_1.bin", &[one.clone(), two.clone()].concat());
    put(root, "cifar-10-batches-bin/data_batch_2.bin", &two);
    put(root, "cifar-10-batches-bin/test_batch.bin", &one);
    let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    put(root, "cifar-10-batches-bin/batches.meta.txt", names.as_bytes());
    let train = open_split(root, DataFormat::Auto, Split::Train).unwrap().unwrap();
    assert_eq!(labels(&*train), [Some(6), Some(9), Some(9)]);
    assert_eq!((train.classes().len(), train.classes()[6].as_str()), (10, "frog"));
    let sample = train.read(0).unwrap();
    assert_eq!(sample.encoding, Encoding::Raw { width: 32, height: 32 });
    assert_eq!((sample.bytes.len(), &sample.bytes[..6]), (3072, &[59, 62, 63, 43, 46, 45][..]));
    assert_eq!(train.read(2).unwrap().bytes[..6], [1, 3, 5, 2, 4, 6]);
    assert!(train.key(2).ends_with("data_batch_2.bin:0"), "{}", train.key(2));
    let test = open_split(root, DataFormat::Cifar, Split::Eval).unwrap().unwrap();
    assert_eq!(labels(&*test), [Some(6)]);
    assert_eq!(open(root, DataFormat::Auto).unwrap().len(), 4);
    assert_ne!(train.digest(), test.digest());
}

#[test]
fn cifar_100_counts_fine_labels() {
    let dir = TempDir::new().unwrap();
    put(dir.path(), "train.bin", &record(&[11, 97], [1, 0], [2, 0], [3, 0]));
    let train = open_split(dir.path(), DataFormat::Auto, Split::Train).unwrap().unwrap();
    assert_eq!((train.label(0), train.classes().len()), (Some(97), 100));
    assert_eq!(train.read(0).unwrap().bytes[..3], [1, 2, 3]);
    assert!(open_split(dir.path(), DataFormat::Auto, Split::Eval).unwrap().is_none());
}

#[test]
fn damaged_cifar() {
    let dir = TempDir::new().unwrap();
    let one = record(&[6], [1, 2], [3, 4], [5, 6]);
    put(dir.path(), "data_batch_1.bin", &one[..3000]);
    assert_eq!(
        error(dir.path(), DataFormat::Auto),
        "`DIR/data_batch_1.bin`: 3000 bytes is not a whole number of 3073-byte records: truncated?"
    );
    put(dir.path(), "data_batch_1.bin", &[one.clone(), record(&[10], [0; 2], [0; 2], [0; 2])].concat());
    assert_eq!(
        error(dir.path(), DataFormat::Auto),
        "`DIR/data_batch_1.bin`: record 1 has label 10, of 10 classes: not CIFAR, or damaged"
    );
    put(dir.path(), "data_batch_1.bin", &one);
    put(dir.path(), "train.bin", &one);
    assert!(error(dir.path(), DataFormat::Auto).contains("CIFAR-10 and of CIFAR-100 together"));
}

// --- IDX ------------------------------------------------------------------------------------------------------

const IMAGES: [u8; 16 + 12] = [
    0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, // 2 images of 2 x 3
    1, 2, 3, 4, 5, 6, 250, 251, 252, 253, 254, 255,
];
const LABELS: [u8; 8 + 2] = [0, 0, 8, 1, 0, 0, 0, 2, 7, 0];

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_plain_and_gzipped() {
    for zipped in [false, true] {
        let dir = TempDir::new().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            if zipped {
                put(dir.path(), &format!("{name}.gz"), &gz(bytes))
            } else {
                put(dir.path(), name, bytes)
            }
        };
        file("train-images-idx3-ubyte", &IMAGES);
        file("train-labels-idx1-ubyte", &LABELS);
        let train = open_split(dir.path(), DataFormat::Auto, Split::Train).unwrap().unwrap();
        assert_eq!((labels(&*train), train.classes().len()), (vec![Some(7), Some(0)], 8));
        let sample = train.read(1).unwrap();
        assert_eq!(sample.encoding, Encoding::Raw { width: 3, height: 2 });
        let gray = [250u8, 251, 252, 253, 254, 255];
        assert_eq!(sample.bytes, gray.iter().flat_map(|&g| [g; 3]).collect::<Vec<_>>());
        assert!(open_split(dir.path(), DataFormat::Auto, Split::Eval).unwrap().is_none());
        file("t10k-images.idx3-ubyte", &IMAGES);
        let test = open_split(dir.path(), DataFormat::Idx, Split::Eval).unwrap().unwrap();
        assert_eq!((test.len(), test.label(0), test.classes().len()), (2, None, 0));
    }
}

#[test]
fn damaged_idx() {
    let dir = TempDir::new().unwrap();
    let refuse = |images: &[u8], labels: &[u8], expected: &str| {
        put(dir.path(), "train-images-idx3-ubyte", images);
        put(dir.path(), "train-labels-idx1-ubyte", labels);
        let message = error(dir.path(), DataFormat::Auto);
        assert!(message.contains(expected), "{message}");
    };
    refuse(
        &IMAGES[..27],
        &LABELS,
        "`DIR/train-images-idx3-ubyte`: 11 bytes of data for 2 x 2 x 3: truncated?",
    );
    refuse(&IMAGES[..10], &LABELS, "does not start with 00 00 08 03");
    refuse(&LABELS, &LABELS, "does not start with 00 00 08 03");
    refuse(&IMAGES, &[0, 0, 8, 1, 0, 0, 0, 1, 7], "1 labels for 2 images: they are not of one set");
    let mut huge = IMAGES;
    huge[4..16].fill(0xFF);
    refuse(&huge, &LABELS, "12 bytes of data for 4294967295 x 4294967295 x 4294967295");
    refuse(&[0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3], &LABELS, "0 images of 2 x 3: nothing to use");
    fs::remove_file(dir.path().join("train-images-idx3-ubyte")).unwrap();
    let mut cut = gz(&IMAGES);
    cut.truncate(cut.len() - 6);
    put(dir.path(), "train-images-idx3-ubyte.gz", &cut);
    assert!(error(dir.path(), DataFormat::Auto).starts_with("cannot read `DIR/train-images-idx3-ubyte.gz`"));
}

/// What a run sees of sets that are divided by the names of their files.
#[test]
fn stats_and_verify_look_at_both_parts_of_such_files() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let idx = root.join("idx");
    put(&idx, "train-images-idx3-ubyte", &IMAGES);
    put(&idx, "train-labels-idx1-ubyte", &LABELS);
    put(&idx, "t10k-images-idx3-ubyte", &IMAGES);
    let cifar = root.join("cifar");
    let one = record(&[6], [59, 43], [62, 46], [63, 45]);
    put(&cifar, "cifar-10-batches-bin/data_batch_1.bin", &one.repeat(3));
    put(&cifar, "cifar-10-batches-bin/test_batch.bin", &one);
    for (set, train, test) in [(&idx, 2, 2), (&cifar, 3, 1)] {
        let stats = check::stats(set, DataFormat::Auto, Reading::default(), 2).unwrap();
        let [first, second] = &stats[..] else { panic!("{stats:?}") };
        assert_eq!((first.samples, second.samples), (train, test));
        assert!(first.part.ends_with(" (train)") && second.part.ends_with(" (test)"), "{stats:?}");
        for (stats, split) in stats.iter().zip([Split::Train, Split::Eval]) {
            let source = open_split(set, DataFormat::Auto, split).unwrap().unwrap();
            assert_eq!((stats.samples, &stats.digest), (source.len(), &source.digest()));
        }
        let report = check::verify(set, DataFormat::Auto, 2, &|_, _| {}).unwrap();
        assert_eq!((report.samples, report.problems), (train + test, vec![]));
    }
    // Damage in the test part is found; one part alone is one part.
    put(&idx, "t10k-images-idx3-ubyte", &IMAGES[..20]);
    assert!(
        check::verify(&idx, DataFormat::Auto, 2, &|_, _| {}).unwrap_err().to_string().contains("t10k-images")
    );
    fs::remove_file(idx.join("train-images-idx3-ubyte")).unwrap();
    put(&idx, "t10k-images-idx3-ubyte", &IMAGES);
    assert_eq!(check::stats(&idx, DataFormat::Idx, Reading::default(), 1).unwrap().len(), 1);
    fs::remove_file(idx.join("t10k-images-idx3-ubyte")).unwrap();
    assert!(check::stats(&idx, DataFormat::Idx, Reading::default(), 1).is_err());
}

#[test]
fn a_shard_that_leads_nowhere_is_not_passed_over() {
    let dir = TempDir::new().unwrap();
    let mut tar = Vec::new();
    member(&mut tar, "a.png", &rgb_png(4, 4, 1), b'0');
    put(dir.path(), "a.tar", &tar);
    assert_eq!(open(dir.path(), DataFormat::Auto).unwrap().len(), 1);
    for target in ["nowhere", "b.tar"] {
        std::os::unix::fs::symlink(target, dir.path().join("b.tar")).unwrap();
        let error = open(dir.path(), DataFormat::Tar).err().unwrap();
        assert_eq!(error.exit_code(), 3, "{error}");
        assert!(error.to_string().contains("b.tar`: "), "{error}");
        fs::remove_file(dir.path().join("b.tar")).unwrap();
    }
}
