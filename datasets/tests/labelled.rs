//! Sets of labelled pictures: folders, lists, IDX files and what is wrong with them.

use std::io::Write;
use std::path::{Path, PathBuf};

use fulgur_datasets::fetch::DataDir;
use fulgur_datasets::labelled::{EmojiClasses, HELD_OUT_ONE_IN, Item, Labelled, LabelledError, Part};
use fulgur_datasets::media::{Picture, read_picture, write_png};

fn plain(width: usize, height: usize, value: u8) -> Picture {
    Picture::new(vec![value; width * height * 3], width, height, 3).unwrap()
}

fn put(folder: &Path, name: &str, value: u8) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_png(&path, &plain(4, 3, value)).unwrap();
    path
}

/// One line that says all of `parts`.
fn refused<T: std::fmt::Debug>(outcome: Result<T, LabelledError>, parts: &[&str]) {
    let text = outcome.unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text}: no {part:?}");
    }
}

/// A PNG file whose header claims a size, with its right checksum.
fn header_of(width: u32, height: u32) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(put(folder.path(), "a.png", 9)).unwrap();
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let sum = !bytes[12..29].iter().fold(u32::MAX, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
        })
    });
    bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    bytes
}

#[test]
fn folders_are_classes_and_what_is_no_picture_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    put(root, "birds/owl/1.png", 1);
    put(root, "birds/owl/2.jpg", 2);
    put(root, "ants/x.txt", 3);
    put(root, "birds/3.png", 4);
    put(root, "beside.png", 5);
    std::fs::create_dir_all(root.join("nobody")).unwrap();
    std::fs::create_dir_all(root.join("letters")).unwrap();
    std::fs::write(root.join("letters/a.png"), "no picture").unwrap();
    std::fs::write(root.join("birds/empty.png"), "").unwrap();
    let huge = header_of(65535, 65535);
    std::fs::write(root.join("birds/huge.png"), &huge).unwrap();
    std::fs::write(root.join("birds/header.png"), &huge[..33]).unwrap();
    // The same as JPEG: a start, a frame of 65535 x 65535 with three components, and nothing else.
    let frame = [
        0xff, 0xd8, 0xff, 0xc0, 0, 17, 8, 255, 255, 255, 255, 3, 1, 17, 0, 2, 17, 0, 3, 17, 0,
    ];
    std::fs::write(root.join("birds/huge.jpg"), frame).unwrap();
    std::fs::write(root.join("birds/list.csv"), "a,b").unwrap();
    let set = Labelled::folder(root).unwrap();
    assert_eq!(set.classes(), ["ants", "birds", "birds/owl"]);
    let keys: Vec<_> = (0..set.len()).map(|i| (set.key(i), set.label(i))).collect();
    assert_eq!(
        keys,
        [
            ("ants/x.txt", Some(0)),
            ("birds/3.png", Some(1)),
            ("birds/owl/1.png", Some(2)),
            ("birds/owl/2.jpg", Some(2))
        ]
    );
    assert_eq!(set.picture(3).unwrap(), plain(4, 3, 2));
    let skipped = set.skipped();
    let counts = (
        skipped.no_picture,
        skipped.broken,
        skipped.no_class,
        skipped.empty_classes,
    );
    assert_eq!(counts, (3, 3, 1, 2), "{:?}", skipped.messages);
    let all = skipped.messages.join("\n");
    assert!(all.contains("huge.png: pixels 4294836225 exceeds"), "{all}");
    assert!(all.contains("header.png: cannot decode: "), "{all}");
    assert!(all.contains("huge.jpg: "), "{all}");
    assert_eq!(skipped.messages.len(), skipped.total());
    refused(set.picture(4), &["picture: found 4, expected less than 4"]);
}

#[test]
fn folders_of_parts_keep_them() {
    let folder = tempfile::tempdir().unwrap();
    for n in 0..5 {
        put(folder.path(), &format!("train/a/{n}.png"), n);
        put(folder.path(), &format!("train/b/{n}.png"), n);
    }
    put(folder.path(), "val/b/9.png", 9);
    let set = Labelled::folder(folder.path()).unwrap();
    assert_eq!(set.classes(), ["a", "b"]);
    assert_eq!(set.counts(Part::Train), [5, 5]);
    assert_eq!(set.counts(Part::HeldOut), [0, 1]);
    set.check_classes().unwrap();
}

#[test]
fn sets_that_teach_nothing_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        Labelled::folder(folder.path()),
        &["pictures: found none, expected at least one"],
    );
    std::fs::write(folder.path().join("a.txt"), "words").unwrap();
    refused(
        Labelled::folder(folder.path()),
        &["found none (1 left out", "a.txt"],
    );
    put(folder.path(), "b.png", 1);
    let flat = Labelled::folder(folder.path()).unwrap();
    assert_eq!((flat.len(), flat.label(0), flat.classes().len()), (1, None, 0));
    refused(
        flat.check_classes(),
        &["classes: found none, expected at least two"],
    );

    let set = |labels: &[Option<usize>], names: &[&str]| {
        let items = labels.iter().enumerate().map(|(n, &label)| Item {
            picture: plain(1, 1, 0),
            label,
            caption: None,
            key: n.to_string(),
        });
        let names = names.iter().map(|&name| name.to_owned()).collect();
        Labelled::in_memory("mine", names, items.collect())
    };
    let one = set(&[Some(0); 50], &["dog"]).unwrap();
    refused(
        one.check_classes(),
        &["mine: classes: found only \"dog\", expected at least two"],
    );
    let hole = set(&[Some(0); 50], &["dog", "cat"]).unwrap();
    refused(hole.check_classes(), &["found none of class \"cat\" to train on"]);
    refused(
        set(&[None, Some(0)], &["a", "b"]).unwrap().check_classes(),
        &["label: found none for \"0\""],
    );
    refused(
        set(&[Some(2)], &["a", "b"]),
        &["mine: label of picture 0: found 2, expected less than 2"],
    );
    refused(
        Labelled::open("no/such", Path::new("data")),
        &["no/such: no such pictures", "fashion-mnist, mnist-5k"],
    );
    refused(
        Labelled::open("emoji", folder.path()),
        &["emoji.safetensors", "(fulgur data fetch emoji prepares the set)"],
    );
}

#[test]
fn lists_have_captions_labels_and_parts() {
    let folder = tempfile::tempdir().unwrap();
    for n in 0..4 {
        put(folder.path(), &format!("p/{n}.png"), n);
    }
    let list = folder.path().join("list.jsonl");
    let write = |text: &str| std::fs::write(&list, text).unwrap();
    write(concat!(
        "{\"image\": \"p/0.png\", \"caption\": \"nothing\", \"label\": \"zero\", \"split\": \"held_out\", \"more\": 1}\n\n",
        "{\"image\": \"p/1.png\", \"label\": \"one\", \"split\": \"train\"}\n",
        "{\"image\": \"p/absent.png\", \"label\": \"absent\"}\n",
        "{\"image\": \"p/2.png\", \"caption\": \"two\", \"split\": \"train\"}\n",
    ));
    let set = Labelled::open(list.to_str().unwrap(), Path::new("")).unwrap();
    assert_eq!(set.classes(), ["absent", "one", "zero"]);
    assert_eq!((set.len(), set.skipped().broken), (3, 1));
    assert_eq!((set.label(0), set.caption(0)), (Some(2), Some("nothing")));
    assert_eq!((set.label(2), set.caption(2)), (None, Some("two")));
    assert_eq!(set.part(Part::HeldOut), [0]);
    assert_eq!(set.picture(2).unwrap(), plain(4, 3, 2));

    write("{\"image\": \"p/0.png\", \"label\": 0}\n{\"image\": \"p/1.png\", \"label\": 3}\n");
    let set = Labelled::jsonl(&list).unwrap();
    assert_eq!((set.classes().len(), set.label(1)), (4, Some(3)));
    for (text, message) in [
        (
            "{\"image\": \"p/0.png\", \"label\": -1}",
            "line 1: label: found -1, expected 0 to 99999",
        ),
        (
            "{\"image\": \"p/0.png\", \"label\": 100000}",
            "found 100000, expected 0 to 99999",
        ),
        (
            "{\"image\": \"p/0.png\", \"label\": 1}\n{\"image\": \"p/1.png\", \"label\": \"a\"}",
            "line 2: label: found \"a\", expected a number",
        ),
        (
            "{\"image\": \"p/0.png\", \"label\": \"a\"}\n{\"image\": \"p/1.png\", \"label\": 1}",
            "line 2: label: found 1, expected a name",
        ),
        ("{\"caption\": \"a\"}", "line 1: found missing field `image`"),
        ("{\"image\": \"p/9.png\"}", "pictures: found none (1 left out"),
        ("", "pictures: found none, expected at least one"),
        ("[1]", "line 1: found"),
    ] {
        write(text);
        refused(Labelled::jsonl(&list), &["list.jsonl", message]);
    }
}

fn idx(shape: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, shape.len() as u8];
    for length in shape {
        bytes.extend(length.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

#[test]
fn idx_files_are_read_packed_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let images = put("train-images-idx3-ubyte", &idx(&[2, 1, 3], &[1, 2, 3, 4, 5, 6]));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&idx(&[2], &[0, 2])).unwrap();
    let labels = put("train-labels-idx1-ubyte", &gzip.finish().unwrap());
    let set = Labelled::open(images.to_str().unwrap(), Path::new("")).unwrap();
    assert_eq!((set.len(), set.side(), set.is_grey()), (2, Some([1, 3]), true));
    assert_eq!(set.classes(), ["0", "1", "2"]);
    assert_eq!(set.label(1), Some(2));
    assert_eq!(set.picture(1).unwrap().pixels, [4, 4, 4, 5, 5, 5, 6, 6, 6]);

    put("t10k-images-idx3-ubyte", &idx(&[1, 1, 3], &[7, 8, 9]));
    put("t10k-labels-idx1-ubyte", &idx(&[1], &[1]));
    let set = Labelled::idx(&images, &labels).unwrap();
    assert_eq!(
        (set.part(Part::Train), set.part(Part::HeldOut)),
        (vec![0, 1], vec![2])
    );
    assert_eq!((set.label(2), set.picture(2).unwrap().pixels[0]), (Some(1), 7));

    for (bytes, message) in [
        (idx(&[1], &[0]), "labels: found 1, expected 2"),
        (
            idx(&[3], &[0, 1]),
            "bytes: found 2, expected as many as shape [3]",
        ),
        (idx(&[u32::MAX], &[]), "bytes: found 0"),
        (idx(&[1, 2], &[0, 1]), "header: found [00, 00, 08, 02"),
        (Vec::new(), "header: found []"),
        (vec![0x1f, 0x8b, 8], "cannot read"),
    ] {
        put("train-labels-idx1-ubyte", &bytes);
        refused(Labelled::idx(&images, &labels), &["train-labels", message]);
    }
    let empty = put("empty", &idx(&[2, 0, 3], &[]));
    put("train-labels-idx1-ubyte", &idx(&[2], &[0, 0]));
    refused(Labelled::idx(&empty, &labels), &["pictures: found 2 of 3 x 0"]);
    let huge = put("huge", &idx(&[u32::MAX; 3], &[1]));
    refused(Labelled::idx(&huge, &labels), &["bytes: found 1"]);
}

#[test]
fn pictures_that_break_later_are_named_or_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let whole = put(folder.path(), "a/1.png", 1);
    put(folder.path(), "b/1.png", 2);
    let bytes = std::fs::read(&whole).unwrap();
    // The header is whole, the pixels are not.
    std::fs::write(folder.path().join("a/2.png"), &bytes[..bytes.len() - 20]).unwrap();
    let mut set = Labelled::folder(folder.path()).unwrap();
    assert_eq!((set.len(), set.skipped().total()), (3, 0));
    refused(set.picture(1), &["a/2.png", "not a media file"]);
    set.drop_broken();
    assert_eq!((set.len(), set.skipped().broken), (2, 1));
    assert_eq!((set.key(1), set.picture(1).unwrap()), ("b/1.png", plain(4, 3, 2)));
}

#[test]
fn held_out_pictures_are_chosen_by_their_key_alone() {
    let item = |key: String| Item {
        picture: plain(1, 1, 0),
        label: Some(0),
        caption: None,
        key,
    };
    let set = |keys: std::ops::Range<usize>| {
        let items = keys.flat_map(|n| [item(format!("k{n}")), item(format!("k{n}"))]);
        Labelled::in_memory("keys", vec!["a".into()], items.collect()).unwrap()
    };
    let (few, many) = (set(0..1000), set(0..3000));
    let held = many.part(Part::HeldOut);
    let expected = 6000 / HELD_OUT_ONE_IN as usize;
    assert!(held.len().abs_diff(expected) < expected / 5, "{}", held.len());
    assert!(
        held.chunks(2).all(|pair| pair[0] + 1 == pair[1]),
        "equal keys stay together"
    );
    assert!(few.part(Part::HeldOut) == held.iter().copied().filter(|&n| n < 2000).collect::<Vec<_>>());
}

#[test]
fn opacity_is_laid_over_white_and_single_pixels_work() {
    let folder = tempfile::tempdir().unwrap();
    let glass = Picture::new(vec![0, 0, 0, 0], 1, 1, 4).unwrap();
    write_png(&folder.path().join("g.png"), &glass).unwrap();
    let set = Labelled::folder(folder.path()).unwrap();
    assert_eq!(set.picture(0).unwrap(), plain(1, 1, 255));
    assert_eq!(read_picture(&folder.path().join("g.png")).unwrap(), glass);
}

/// A prepared set, or a word that it is not there.
fn prepared(name: &str) -> Option<Labelled> {
    let data = match std::env::var_os("FULGUR_DATA") {
        Some(_) => DataDir::from_env(),
        None => DataDir::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../data")),
    };
    let folder = name.split('/').next().unwrap();
    if !data.set(folder).join("manifest.json").is_file() {
        eprintln!("skipped: {folder} is not prepared");
        return None;
    }
    Some(Labelled::open(name, data.path()).unwrap())
}

#[test]
fn prepared_sets_are_what_they_say() {
    for (name, count, classes) in [
        ("fashion-mnist", 70_000, 10),
        ("mnist-5k", 5000, 10),
        ("emoji", 3786, 10),
        ("emoji/subcategory", 3786, 99),
        ("gcompris", 322, 9),
        ("openclipart", 3978, 22),
    ] {
        let Some(set) = prepared(name) else { continue };
        assert!(set.len().abs_diff(count) <= count / 30, "{name}: {}", set.len());
        assert_eq!(set.classes().len(), classes, "{name}: {:?}", set.classes());
        for index in [0, set.len() / 2, set.len() - 1] {
            set.picture(index).unwrap();
            assert!(set.label(index).unwrap() < classes);
        }
        let (train, held) = (set.part(Part::Train).len(), set.part(Part::HeldOut).len());
        eprintln!(
            "{name}: {} pictures, {train} to train on, {held} held out",
            set.len()
        );
    }
    if let Some(set) = prepared("fashion-mnist") {
        assert_eq!(set.counts(Part::HeldOut), [1000; 10]);
    }
    if let Some(set) = prepared("mnist-5k") {
        assert_eq!(set.counts(Part::All), [500; 10]);
    }
}

#[test]
fn skin_tones_of_an_emoji_stay_together() {
    let Some(set) = prepared("emoji") else { return };
    let held = set.part(Part::HeldOut);
    let keys: std::collections::HashSet<&str> = held.iter().map(|&index| set.key(index)).collect();
    assert!(
        set.part(Part::Train)
            .iter()
            .all(|&index| !keys.contains(set.key(index)))
    );
    assert_ne!(EmojiClasses::Category, EmojiClasses::Subcategory);
}
