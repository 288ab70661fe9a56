//! Files of torch.save, and files that are made to hurt.

use std::io::Write;
use std::path::PathBuf;

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::*;
use crate::params::file;

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "tests", "golden", name]
        .iter()
        .collect()
}

fn same(found: &Tensor, expected: &Tensor, name: &str) {
    assert_eq!(
        (found.dims(), found.dtype()),
        (expected.dims(), expected.dtype()),
        "{name}"
    );
    let values = |t: &Tensor| {
        t.flatten_all()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
    };
    assert_eq!(values(found), values(expected), "{name}");
}

#[test]
fn tensors_are_those_of_torch() {
    let expected = file::read(&golden("checkpoint.safetensors"), &Device::Cpu)
        .unwrap()
        .tensors;
    for (name, prefix, count) in [
        ("plain.pth", "plain.", 20),
        ("protocol.pth", "plain.", 20),
        ("training.pth", "training.", 7),
        ("lightning.ckpt", "training.", 7),
    ] {
        let checkpoint = Checkpoint::open(&golden("checkpoint").join(name)).unwrap();
        let found = checkpoint.read(|_| true).unwrap();
        assert_eq!(found.len(), count, "{name}");
        for (tensor, found) in &found {
            same(found, &expected[&format!("{prefix}{tensor}")], tensor);
            assert_eq!(checkpoint.shapes()[tensor], found.dims(), "{tensor}");
        }
        let part = checkpoint.read(|tensor| tensor.ends_with('n')).unwrap();
        assert!(!part.is_empty() && part.len() < count);
    }
    let line = refused(&golden("checkpoint").join("older.pth"));
    assert!(
        line.contains("before 1.6") && line.contains("torch.save"),
        "{line}"
    );
}

#[track_caller]
fn refused(path: &Path) -> String {
    let line = Checkpoint::open(path)
        .map(|c| c.shapes())
        .unwrap_err()
        .to_string();
    assert!(!line.contains('\n') && line.len() < 600, "{line}");
    line
}

/// An archive of these entries, in a file of its own.
fn archive(folder: &Path, entries: &[(&str, &[u8])], method: CompressionMethod) -> PathBuf {
    let path = folder.join("x.pth");
    let mut writer = ZipWriter::new(File::create(&path).unwrap());
    for (name, bytes) in entries {
        let options = SimpleFileOptions::default().compression_method(method);
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap();
    path
}

/// What a pickle alone is refused for.
fn pickled(folder: &Path, pickle: &[u8]) -> String {
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", pickle), ("a/data/0", &[0; 64])];
    refused(&archive(folder, &entries, CompressionMethod::Stored))
}

/// `{"w": tensor}` with a storage of `count` floats, and these arguments behind it.
fn one_tensor(count: i32, offset: i32, shape: &[i32], stride: &[i32]) -> Vec<u8> {
    let mut p = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n".to_vec();
    let int = |p: &mut Vec<u8>, n: i32| {
        p.push(b'J');
        p.extend(n.to_le_bytes());
    };
    p.extend(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu");
    int(&mut p, count);
    p.extend(b"tQ");
    int(&mut p, offset);
    for list in [shape, stride] {
        p.push(b'(');
        list.iter().for_each(|&n| int(&mut p, n));
        p.push(b't');
    }
    p.extend(b"\x89)tRs.");
    p
}

#[test]
fn nothing_is_run_and_names_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mark = dir.join("mark");
    let command = format!("touch {}", mark.display());
    let length = (command.len() as u32).to_le_bytes();
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch.hub", "load"),
    ] {
        let mut pickle = format!("\x02c{module}\n{name}\n").into_bytes();
        pickle.insert(0, 0x80);
        pickle.push(b'X');
        pickle.extend(length);
        pickle.extend(command.as_bytes());
        pickle.extend(b"\x85R.");
        let line = pickled(dir, &pickle);
        assert!(line.contains(&format!("names {module}.{name}")), "{line}");
    }
    // By the stack, as newer protocols do, and by the instructions of older ones.
    let line = pickled(dir, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.");
    assert!(line.contains("names os.system"), "{line}");
    let line = pickled(dir, b"(S'touch x'\nios\nsystem\n.");
    assert!(line.contains("instruction 0x53"), "{line}");
    // Classes that are passed over beside the weights are nothing to pass over among them.
    let mut pickle = one_tensor(1, 0, &[1], &[1]);
    let at = pickle.len() - 1;
    pickle.splice(at..at, *b"X\x01\x00\x00\x00ycargparse\nNamespace\n)\x81s");
    let line = pickled(dir, &pickle);
    assert!(
        line.contains("is an object of another class, expected a tensor"),
        "{line}"
    );
    let line = pickled(dir, b"\x80\x02ctorch\nFloatStorage\n)R.");
    assert!(line.contains("no function"), "{line}");
    assert!(!mark.exists());
}

#[test]
fn sizes_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let fits = one_tensor(16, 3, &[2, 3], &[6, 2]);
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", &fits), ("a/data/0", &[0; 64])];
    let path = archive(dir, &entries, CompressionMethod::Stored);
    assert_eq!(Checkpoint::open(&path).unwrap().shapes()["w"], [2, 3]);
    for (count, offset, shape, stride) in [
        (17, 0, &[1][..], &[1][..]),
        (16, 0, &[17], &[1]),
        (16, 15, &[2], &[1]),
        (16, 16, &[1], &[1]),
        (16, 0, &[2, 2], &[16, 1]),
        (i32::MAX, 0, &[i32::MAX], &[1]),
        (16, 0, &[i32::MAX, i32::MAX, i32::MAX], &[0, 0, 0]),
        (16, 0, &[0, i32::MAX, i32::MAX, i32::MAX], &[0, 0, 0, 0]),
        (16, 0, &[2, 2], &[i32::MAX, i32::MAX]),
    ] {
        let line = pickled(dir, &one_tensor(count, offset, shape, stride));
        assert!(line.contains("tensor `w`") && line.contains("beyond"), "{line}");
    }
    for (count, offset, shape, stride) in [
        (-1, 0, &[1][..], &[1][..]),
        (16, -1, &[1], &[1]),
        (16, 0, &[-1], &[1]),
        (16, 0, &[1], &[-1]),
        (16, 0, &[1, 1], &[1]),
    ] {
        let line = pickled(dir, &one_tensor(count, offset, shape, stride));
        assert!(
            line.contains("no typed storage") || line.contains("do not fit"),
            "{line}"
        );
    }
    // One float that is seen a billion times.
    let line = pickled(dir, &one_tensor(16, 0, &[1 << 30], &[0]));
    assert!(line.contains("8 times the"), "{line}");
    let line = pickled(dir, &one_tensor(16, 0, &[1; 17], &[0; 17]));
    assert!(line.contains("17 axes"), "{line}");
}

#[test]
fn bombs_and_pits_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let deep = |opening: &[u8], closing: &[u8], count: usize| {
        let mut pickle = b"\x80\x02".to_vec();
        pickle.extend(opening.repeat(count));
        pickle.extend(closing.repeat(count));
        pickle.push(b'.');
        pickle
    };
    for pickle in [
        deep(b"(", b"t", 1 << 20),
        deep(b"N", b"\x85", 1 << 16),
        [b"\x80\x02N".to_vec(), b"\x85".repeat(1 << 20), b".".to_vec()].concat(),
        [
            b"\x80\x02N".to_vec(),
            b"]".repeat(1 << 20),
            b"a".repeat(1 << 20),
            b".".to_vec(),
        ]
        .concat(),
        // Each tuple holds the one before twice.
        [
            b"\x80\x02Nq\x00".to_vec(),
            b"h\x00h\x00\x86q\x00".repeat(1 << 20),
            b".".to_vec(),
        ]
        .concat(),
    ] {
        let line = pickled(dir, &pickle);
        assert!(
            line.contains("nested") || line.contains("no dictionary") || line.contains("ends"),
            "{line}"
        );
    }
    let many = [b"\x80\x02".to_vec(), b"}".repeat(1 << 23), b".".to_vec()].concat();
    assert!(pickled(dir, &many).contains("values"));
    // Texts and memo entries whose lengths are lies.
    for (pickle, words) in [
        (&b"\x80\x02X\xff\xff\xff\x7fabc."[..], "a length of 2147483647"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.", "a length of"),
        (b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\xffabc.", "a length of"),
        (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", "a length of"),
        (b"\x80\x02j\xff\xff\xff\xff.", "never remembered"),
        (b"\x80\x02q\x00.", "more values than there are"),
        (b"\x80\x02t.", "without a beginning"),
        (b"\x80\x02(R.", "more values than there are"),
        (b"\x80\x02}N.", "no dictionary of tensors"),
        (b"\x80\x02}NNs.", "no dictionary of tensors"),
        (b"\x80\x02]NNs.", "no dictionary"),
        (b"\x80\x02}X\x01\x00\x00\x00aNu.", "without a beginning"),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x09.", "protocol 9"),
        (b"\x80\x02\xff.", "instruction 0xff"),
        (b"\x80\x02", "ends after 2 bytes"),
        (b"\x80\x02cos", "255 bytes"),
        (b"", "ends after 0 bytes"),
    ] {
        let line = pickled(dir, pickle);
        assert!(line.contains(words), "{words}: {line}");
    }
    // A small archive of a gigabyte of zeros.
    let zeros = vec![0; 1 << 26];
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", &zeros), ("a/data/0", &[0; 64])];
    let line = refused(&archive(dir, &entries, CompressionMethod::Deflated));
    assert!(line.contains("compressed"), "{line}");
}

#[test]
fn archives_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let stored = CompressionMethod::Stored;
    for (entries, words) in [
        (&[("a/x", &b"y"[..])][..], "0 entries data.pkl"),
        (
            &[("a/data.pkl", b"."), ("b/data.pkl", b".")],
            "2 entries data.pkl",
        ),
        (
            &[("a/data.pkl", &one_tensor(16, 0, &[1], &[1])[..])],
            "no entry a/data/0",
        ),
        (
            &[
                ("a/data.pkl", &one_tensor(1, 0, &[1], &[1])[..]),
                ("a/byteorder", b"big"),
            ],
            "expected little",
        ),
    ] {
        let line = refused(&archive(dir, entries, stored));
        assert!(line.contains(words), "{words}: {line}");
    }
    let path = dir.join("x.pth");
    for bytes in [&b""[..], b"hello", b"PK\x03\x04", b"\x80\x02}."] {
        std::fs::write(&path, bytes).unwrap();
        refused(&path);
    }
    let whole = std::fs::read(golden("checkpoint").join("training.pth")).unwrap();
    for length in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..length]).unwrap();
        refused(&path);
    }
    // Bytes that are changed give an error or other numbers, never a panic.
    for at in (0..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            drop(checkpoint.read(|_| true));
        }
    }
    assert!(refused(dir).contains("regular file"));
    assert!(refused(&dir.join("absent")).contains("absent"));
}
