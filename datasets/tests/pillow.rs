//! Pictures against Pillow: resizing, evaluation, operations and formats. `tests/golden/pillow.py` made the expected ones.

use std::path::{Path, PathBuf};

use fulgur_datasets::augment::{Operation, View};
use fulgur_datasets::media::{Filter, Picture, decode_picture, decode_upright};
use fulgur_datasets::store::Mapped;

fn golden() -> Mapped {
    let path: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "..",
        "tests",
        "golden",
        "pillow.safetensors",
    ]
    .iter()
    .collect();
    Mapped::open(&path).unwrap()
}

fn picture(golden: &Mapped, name: &str) -> Picture {
    let tensor = golden.tensor(name).unwrap_or_else(|| panic!("no {name}"));
    let [height, width, channels] = *tensor.shape() else {
        panic!("{name}: {:?}", tensor.shape());
    };
    Picture::new(tensor.data().to_vec(), width, height, channels).unwrap()
}

/// The parts of all names that begin with `prefix.`.
fn names(golden: &Mapped, prefix: &str) -> Vec<String> {
    let start = format!("{prefix}.");
    let names = golden.names();
    let names = names.iter().filter_map(|name| name.strip_prefix(&start));
    names.map(str::to_owned).collect()
}

#[test]
fn resized_pictures_have_the_bytes_of_pillow() {
    let golden = golden();
    let mut compared = 0;
    for name in names(&golden, "resize") {
        let (source, rest) = match name.strip_prefix("rgba.") {
            Some(rest) => ("rgba", rest),
            None => ("rgb", name.as_str()),
        };
        let (filter, size) = rest.split_once('.').unwrap();
        let (width, height) = size.split_once('x').unwrap();
        let filter = match filter {
            "bilinear" => Filter::Bilinear,
            "bicubic" => Filter::Bicubic,
            other => panic!("{other}"),
        };
        let resized = picture(&golden, source)
            .resized(width.parse().unwrap(), height.parse().unwrap(), filter)
            .unwrap();
        assert_eq!(resized, picture(&golden, &format!("resize.{name}")), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 18);
}

/// A part of a resized picture is cut out of what Pillow gives for the whole.
#[test]
fn resized_parts_are_those_of_the_whole() {
    let golden = golden();
    for source in ["rgb", "rgba"] {
        let source = picture(&golden, source);
        for [width, height] in [
            [source.width, source.height],
            [source.width, 9],
            [7, source.height],
            [61, 8],
            [5, 90],
        ] {
            let whole = source.resized(width, height, Filter::Bicubic).unwrap();
            for [left, top, w, h] in [[0, 0, width, height], [1, 2, 3, 4], [width - 2, height - 1, 2, 1]] {
                let part = source
                    .resized_part([width, height], [left, top], [w, h], Filter::Bicubic)
                    .unwrap();
                assert_eq!(
                    part,
                    whole.cropped(left, top, w, h).unwrap(),
                    "{width} x {height}"
                );
            }
            let beyond = source.resized_part([width, height], [width, 0], [1, 1], Filter::Bicubic);
            assert!(beyond.unwrap_err().to_string().contains("expected a part of"));
        }
    }
}

#[test]
fn evaluation_sees_what_torchvision_cuts_out() {
    let golden = golden();
    for (size, percent, crop) in [(14, 87, 0.87), (16, 100, 1.0), (24, 90, 0.9)] {
        let view = View {
            height: size,
            width: size,
            crop,
            ..View::default()
        };
        let middle = view.middle(&picture(&golden, "rgb")).unwrap();
        assert_eq!(
            middle,
            picture(&golden, &format!("view.{size}.{percent}")),
            "{size}"
        );
    }
}

#[test]
fn operations_have_the_bytes_of_pillow() {
    let golden = golden();
    let source = picture(&golden, "rgb");
    let mut compared = 0;
    for name in names(&golden, "operation") {
        let (operation, value) = name.split_once('.').unwrap();
        let operation: Operation = serde_json::from_str(&format!("{operation:?}")).unwrap();
        let result = operation.apply(&source, value.parse().unwrap(), [128; 3]);
        assert_eq!(result, picture(&golden, &format!("operation.{name}")), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 35);
    let large = Operation::Equalize.apply(&picture(&golden, "large"), 0.0, [0; 3]);
    assert_eq!(large, picture(&golden, "large.equalize"));
}

#[test]
fn operations_at_magnitude_zero_change_nothing() {
    let source = picture(&golden(), "rgb");
    for operation in Operation::ALL {
        if matches!(operation, Operation::Autocontrast | Operation::Equalize) {
            continue;
        }
        for negative in [false, true] {
            let value = operation.value(0.0, negative, source.width, source.height);
            assert_eq!(operation.apply(&source, value, [1; 3]), source, "{operation:?}");
        }
        let value = operation.value(10.0, true, source.width, source.height);
        let changed = operation.apply(&source, value, [1; 3]) != source;
        assert_eq!(changed, operation != Operation::Identity, "{operation:?}");
    }
}

/// The file of this name and its pixels.
fn file(golden: &Mapped, name: &str) -> (Vec<u8>, Picture) {
    let bytes = golden.tensor(&format!("file.{name}")).unwrap().data().to_vec();
    (bytes, picture(golden, &format!("pixels.{name}")))
}

/// The largest difference of two values.
fn distance(a: &Picture, b: &Picture) -> u8 {
    assert_eq!((a.width, a.height, a.channels), (b.width, b.height, b.channels));
    a.pixels
        .iter()
        .zip(&b.pixels)
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap()
}

#[test]
fn formats_are_told_by_content_and_decoded_as_pillow_does() {
    let golden = golden();
    let lossless = ["grey", "deep", "palette", "gif", "apng", "webp", "bmp"];
    for name in lossless {
        let (bytes, expected) = file(&golden, name);
        let found = decode_upright(&bytes, Path::new("wrong.txt")).unwrap();
        assert_eq!(found, expected, "{name}");
    }
    // Decoders of JPEG round differently.
    let (bytes, expected) = file(&golden, "cmyk");
    let found = decode_upright(&bytes, Path::new("cmyk.png")).unwrap();
    assert!(
        distance(&found, &expected) <= 8,
        "{}",
        distance(&found, &expected)
    );
}

#[test]
fn exif_turns_pictures_and_only_where_asked() {
    let golden = golden();
    for orientation in 1..=8 {
        let (bytes, upright) = file(&golden, &format!("exif{orientation}"));
        assert_eq!(
            decode_upright(&bytes, Path::new("a")).unwrap(),
            upright,
            "{orientation}"
        );
        let stored = decode_picture(&bytes, Path::new("a")).unwrap();
        assert_eq!(stored == upright, orientation == 1, "{orientation}");
    }
    let (bytes, upright) = file(&golden, "turned");
    let found = decode_upright(&bytes, Path::new("a.jpg")).unwrap();
    assert!(distance(&found, &upright) < 40, "{}", distance(&found, &upright));
}

#[test]
fn cut_off_files_are_named_and_never_panic() {
    let golden = golden();
    for name in [
        "cmyk", "grey", "deep", "palette", "gif", "apng", "webp", "bmp", "turned",
    ] {
        let (bytes, _) = file(&golden, name);
        let whole = decode_upright(&bytes, Path::new("whole")).unwrap();
        for length in (0..bytes.len()).step_by(7) {
            match decode_upright(&bytes[..length], Path::new("cut")) {
                // Checksums, end markers or other frames are missing, but no pixel.
                Ok(found) => assert!(found == whole && length > bytes.len() / 3, "{name} {length}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.starts_with("cut: ") && !text.contains('\n'), "{text}");
                }
            }
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            let _ = decode_upright(&damaged, Path::new("damaged"));
        }
    }
}
