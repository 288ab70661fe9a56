//! Pictures and WAV files, which need no FFmpeg.

use fulgur_datasets::media::{
    MAX_PICTURE_PIXELS, Picture, Sound, WavFormat, read_picture, read_wav, write_png, write_wav,
};

#[test]
fn png_is_exact_with_and_without_opacity() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    for channels in [3, 4] {
        let pixels = (0..7 * 5 * channels).map(|k| (k * 37) as u8).collect();
        let picture = Picture::new(pixels, 7, 5, channels).unwrap();
        write_png(&path, &picture).unwrap();
        assert_eq!(read_picture(&path).unwrap(), picture);
    }
    let half = Picture::new(vec![200, 100, 0, 128], 1, 1, 4).unwrap();
    assert_eq!(half.over([0, 100, 200]).pixels, [100, 100, 100]);
}

#[test]
fn pictures_that_do_not_fit_are_refused() {
    assert!(Picture::new(vec![0; 3], 1, 1, 1).is_err());
    assert!(Picture::new(vec![0; 5], 1, 2, 3).is_err());
    assert!(Picture::new(Vec::new(), 0, 0, 3).is_err());
    assert!(Picture::new(Vec::new(), usize::MAX, 8, 4).is_err());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let wrong = Picture {
        pixels: vec![0; 5],
        width: 1,
        height: 2,
        channels: 3,
    };
    assert!(write_png(&path, &wrong).is_err());
    assert!(!path.exists());
}

#[test]
fn broken_and_enormous_pictures_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let picture = Picture::new((0..64 * 64 * 3).map(|k| (k / 5) as u8).collect(), 64, 64, 3).unwrap();
    write_png(&path, &picture).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for len in (0..bytes.len() - 12).step_by(17) {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let text = read_picture(&path).unwrap_err().to_string();
        assert!(text.contains("a.png") && !text.contains('\n'), "{text}");
    }
    // A PNG header that claims 60,000 x 60,000 pixels, with its right checksum.
    let mut bomb = bytes[..33].to_vec();
    bomb[16..20].copy_from_slice(&60_000_u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&60_000_u32.to_be_bytes());
    let sum = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&sum.to_be_bytes());
    bomb.extend_from_slice(&bytes[33..]);
    std::fs::write(&path, &bomb).unwrap();
    let text = read_picture(&path).unwrap_err().to_string();
    assert!(
        text.contains(&format!(
            "pixels 3600000000 exceeds the limit of {MAX_PICTURE_PIXELS}"
        )),
        "{text}"
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
        })
    })
}

#[test]
fn wav_keeps_floats_and_rounds_integers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.wav");
    let sound = Sound::new(vec![0.0, -1.0, 1.0, 0.123_456, -2.0, 1e-9], 2, 11_025).unwrap();
    write_wav(&path, &sound, WavFormat::Float).unwrap();
    assert_eq!(read_wav(&path).unwrap(), sound);
    write_wav(&path, &sound, WavFormat::Int16).unwrap();
    let top = 32767.0 / 32768.0;
    assert_eq!(
        read_wav(&path).unwrap().samples,
        [0.0, -1.0, top, 4045.0 / 32768.0, -1.0, 0.0]
    );
    let strange = Sound::new(vec![f32::NAN], 1, 8000).unwrap();
    assert!(write_wav(&path, &strange, WavFormat::Int16).is_err());
}

#[test]
fn a_wav_that_promises_more_than_it_holds_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.wav");
    write_wav(
        &path,
        &Sound::new(vec![0.5; 1000], 1, 8000).unwrap(),
        WavFormat::Int16,
    )
    .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for len in [0, 3, 20, 43, 44, 100, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let text = read_wav(&path).unwrap_err().to_string();
        assert!(text.contains("a.wav") && !text.contains('\n'), "{text}");
    }
}
