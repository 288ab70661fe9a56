//! AVHScore: how well a soundtrack fits the pictures (TAVGBench section 5, "Audio-Visual Harmoni score").
//!
//! For frames v_1 .. v_N and the whole soundtrack a, with encoders E_V and E_A into one space:
//!
//! ```text
//! AVHScore = (1/N) sum_i cos(E_V(v_i), E_A(a))
//! ```
//!
//! The score is semantic: it asks whether the sound belongs to what is seen, not whether it comes at the right moment.
//! Its value depends on the encoder, whose name goes with every result.

use std::sync::atomic::{AtomicBool, Ordering};

use fulgur_datasets::media::{Sound, Video};
use serde::{Deserialize, Serialize};

use crate::encoder::{EncodeError, Encoder};

/// Floor of the denominator of a cosine.
const EPS: f64 = 1e-6;
/// Score of one clip.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Mean cosine in [-1, 1]; absent when the clip has no soundtrack.
    pub avhscore: Option<f64>,
    /// Frames that were used.
    pub frames: usize,
    /// What is unusual about the clip, in words of one kind each.
    pub flags: Vec<Flag>,
    /// Why there is no score.
    pub reason: Option<String>,
}

/// What is unusual about a scored clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flag {
    /// Nothing to hear.
    SilentAudio,
    /// More or fewer channels than one or two.
    UnusualChannels,
    /// Frames are not evenly spaced.
    VariableFrameRate,
    /// The soundtrack is shorter than the encoder's window and was padded.
    ShortAudio,
    /// Not every frame was used.
    FramesSubsampled,
    /// The file ends early; what could be read was scored.
    Truncated,
}

impl Flag {
    /// The flag for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::SilentAudio => "silent",
            Self::UnusualChannels => "unusual number of channels",
            Self::VariableFrameRate => "variable frame rate",
            Self::ShortAudio => "sound shorter than the encoder's window",
            Self::FramesSubsampled => "not every frame used",
            Self::Truncated => "file ends early",
        }
    }
}

/// Indices of `wanted` frames spread evenly over `available`, first and last included; all when there are fewer.
pub fn frame_indices(available: usize, wanted: Option<usize>) -> Vec<usize> {
    match wanted {
        Some(1) if available > 1 => vec![0],
        Some(wanted) if wanted > 1 && wanted < available => {
            let step = (available - 1) as f64 / (wanted - 1) as f64;
            (0..wanted).map(|i| (i as f64 * step).round() as usize).collect()
        }
        _ => (0..available).collect(),
    }
}

/// Cosine of two vectors, with the reference's floor of 1e-6 under the product of norms.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(&x, &y)| f64::from(x) * f64::from(y))
            .sum::<f64>()
    };
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()).max(EPS)
}

/// A clip as vectors: all that its score needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Encoded {
    /// Frames that are used.
    pub frames: usize,
    /// What is unusual about the clip.
    pub flags: Vec<Flag>,
    /// A vector a frame; none where there is nothing to hear.
    #[serde(skip)]
    pub seen: Vec<Vec<f32>>,
    /// The vector of the soundtrack.
    #[serde(skip)]
    pub heard: Option<Vec<f32>>,
    /// Why there is no score.
    pub reason: Option<String>,
}

impl Encoded {
    /// The score of the vectors.
    pub fn score(self) -> Score {
        Score {
            avhscore: self.heard.and_then(|heard| mean_cosine(&self.seen, &heard)),
            frames: self.frames,
            flags: self.flags,
            reason: self.reason,
        }
    }
}

/// Scores frames against a soundtrack.
///
/// `max_frames` takes that many evenly spaced frames instead of all. A clip without a soundtrack has no score but a
/// reason; a silent one is scored and flagged. Errors when there is no frame, or when `cancel` is set.
pub fn score(
    encoder: &dyn Encoder,
    video: &Video,
    sound: Option<&Sound>,
    max_frames: Option<usize>,
    cancel: &AtomicBool,
) -> Result<Score, EncodeError> {
    Ok(encode(encoder, video, sound, max_frames, cancel)?.score())
}

/// The vectors that [`score`] compares; without a soundtrack there are none.
///
/// # Errors
/// There is no frame, the encoder refuses the clip, or `cancel` is set.
pub fn encode(
    encoder: &dyn Encoder,
    video: &Video,
    sound: Option<&Sound>,
    max_frames: Option<usize>,
    cancel: &AtomicBool,
) -> Result<Encoded, EncodeError> {
    encode_told(encoder, video, sound, max_frames, cancel, &|_, _| {})
}

/// As [`encode`], and tells how many frames of how many are encoded.
///
/// # Errors
/// As [`encode`].
pub fn encode_told(
    encoder: &dyn Encoder,
    video: &Video,
    sound: Option<&Sound>,
    max_frames: Option<usize>,
    cancel: &AtomicBool,
    tell: &dyn Fn(usize, usize),
) -> Result<Encoded, EncodeError> {
    let indices = frame_indices(video.frame_count, max_frames);
    if indices.is_empty() {
        return Err(EncodeError::NoFrames);
    }
    let mut flags = Vec::new();
    if video.variable_rate {
        flags.push(Flag::VariableFrameRate);
    }
    if indices.len() < video.frame_count {
        flags.push(Flag::FramesSubsampled);
    }
    let frames = indices.len();
    let Some(sound) = sound else {
        return Ok(Encoded {
            frames,
            flags,
            seen: Vec::new(),
            heard: None,
            reason: Some("no audio stream".to_owned()),
        });
    };
    if sound.is_silent() {
        flags.push(Flag::SilentAudio);
    }
    if !matches!(sound.channels, 1 | 2) {
        flags.push(Flag::UnusualChannels);
    }
    if sound.duration_s() < encoder.sound_window_s() {
        flags.push(Flag::ShortAudio);
    }
    let heard = encoder.sound(sound)?;
    let seen = told_vectors(encoder, video, &indices, cancel, tell)?;
    Ok(Encoded {
        frames,
        flags,
        seen,
        heard: Some(heard),
        reason: None,
    })
}

/// The vectors of some frames of a clip, in the order of `indices`.
///
/// # Errors
/// The encoder refuses the frames, or `cancel` is set.
///
/// # Panics
/// An index is not below the number of frames.
pub fn frame_vectors(
    encoder: &dyn Encoder,
    video: &Video,
    indices: &[usize],
    cancel: &AtomicBool,
) -> Result<Vec<Vec<f32>>, EncodeError> {
    told_vectors(encoder, video, indices, cancel, &|_, _| {})
}

fn told_vectors(
    encoder: &dyn Encoder,
    video: &Video,
    indices: &[usize],
    cancel: &AtomicBool,
    tell: &dyn Fn(usize, usize),
) -> Result<Vec<Vec<f32>>, EncodeError> {
    let mut vectors = Vec::with_capacity(indices.len());
    for batch in indices.chunks(encoder.batch().max(1)) {
        if cancel.load(Ordering::Relaxed) {
            return Err(EncodeError::Cancelled);
        }
        let frames: Vec<&[u8]> = batch.iter().map(|&i| video.frame(i)).collect();
        vectors.extend(encoder.frames(&frames, video.width, video.height)?);
        tell(vectors.len(), indices.len());
    }
    Ok(vectors)
}

/// AVHScore of vectors: the mean cosine between the frames and the soundtrack; `None` without frames.
pub fn mean_cosine(frames: &[Vec<f32>], sound: &[f32]) -> Option<f64> {
    let total: f64 = frames.iter().map(|frame| cosine(frame, sound)).sum();
    (!frames.is_empty()).then(|| total / frames.len() as f64)
}

/// Mean over the clips that have a score, and their number.
pub fn mean(scores: &[Score]) -> (Option<f64>, usize) {
    let values: Vec<f64> = scores.iter().filter_map(|s| s.avhscore).collect();
    let n = values.len();
    ((n > 0).then(|| values.iter().sum::<f64>() / n as f64), n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean colour against [rms, 0, 0.5]: simple enough to score by hand.
    struct Colour;

    impl Encoder for Colour {
        fn name(&self) -> &str {
            "colour"
        }
        fn sound_window_s(&self) -> f64 {
            0.5
        }
        fn frames(&self, frames: &[&[u8]], _: usize, _: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
            let mean = |frame: &[u8], c: usize| {
                let channel = frame.iter().skip(c).step_by(3);
                channel.clone().map(|&x| f32::from(x)).sum::<f32>() / channel.count() as f32
            };
            Ok(frames
                .iter()
                .map(|f| (0..3).map(|c| mean(f, c)).collect())
                .collect())
        }
        fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
            let power = sound.samples.iter().map(|x| x * x).sum::<f32>() / sound.samples.len() as f32;
            Ok(vec![power.sqrt(), 0.0, 0.5])
        }
    }

    fn video(colours: &[[u8; 3]]) -> Video {
        let frames = colours.iter().flat_map(|c| c.repeat(16)).collect();
        Video::new(frames, 4, 4, 4.0).expect("a valid video")
    }

    fn tone(seconds: f32) -> Sound {
        let samples = (0..(seconds * 8000.0) as usize)
            .map(|i| (i as f32 * 0.3).sin() * 0.5)
            .collect();
        Sound::new(samples, 1, 8000).expect("a valid sound")
    }

    fn run(video: &Video, sound: Option<&Sound>, max_frames: Option<usize>) -> Score {
        score(&Colour, video, sound, max_frames, &AtomicBool::new(false)).expect("a score")
    }

    #[test]
    fn the_order_of_frames_does_not_matter() {
        let (a, b) = ([200, 10, 30], [5, 100, 90]);
        let forward = run(&video(&[a, a, b]), Some(&tone(1.0)), None);
        let shuffled = run(&video(&[b, a, a]), Some(&tone(1.0)), None);
        assert!((forward.avhscore.unwrap_or(9.0) - shuffled.avhscore.unwrap_or(-9.0)).abs() < 1e-12);
        assert_eq!(forward.frames, 3);
        assert!(forward.flags.is_empty());
    }

    #[test]
    fn long_clips_tell_how_far_they_are() {
        let told = std::cell::RefCell::new(Vec::new());
        let tell = |done: usize, all: usize| told.borrow_mut().push((done, all));
        let cancel = AtomicBool::new(false);
        encode_told(
            &Colour,
            &video(&[[9, 10, 30]; 40]),
            Some(&tone(1.0)),
            None,
            &cancel,
            &tell,
        )
        .unwrap();
        assert_eq!(told.into_inner(), [(16, 40), (32, 40), (40, 40)]);
    }

    #[test]
    fn equal_frames_give_the_cosine_of_one() {
        let sound = tone(1.0);
        let one = run(&video(&[[200, 10, 30]]), Some(&sound), None)
            .avhscore
            .unwrap_or(9.0);
        let many = run(&video(&[[200, 10, 30]; 40]), Some(&sound), None)
            .avhscore
            .unwrap_or(-9.0);
        let heard = Colour.sound(&sound).expect("a vector");
        assert!((one - cosine(&[200.0, 10.0, 30.0], &heard)).abs() < 1e-6);
        assert!((one - many).abs() < 1e-12);
    }

    #[test]
    fn clips_without_or_with_silent_sound() {
        let video = video(&[[200, 10, 30], [5, 100, 90]]);
        let mute = run(&video, None, None);
        assert_eq!(
            (mute.avhscore, mute.reason.as_deref()),
            (None, Some("no audio stream"))
        );
        let silence = Sound::new(vec![0.0; 8000 * 6], 6, 8000).expect("a valid sound");
        let silent = run(&video, Some(&silence), None);
        assert!(silent.avhscore.is_some());
        assert_eq!(silent.flags, [Flag::SilentAudio, Flag::UnusualChannels]);
        assert_eq!(mean(&[mute, silent.clone()]), (silent.avhscore, 1));
        assert_eq!(mean(&[]), (None, 0));
    }

    #[test]
    fn subsampled_frames_are_spread_and_flagged() {
        assert_eq!(frame_indices(5, Some(3)), [0, 2, 4]);
        assert_eq!(frame_indices(5, Some(9)), [0, 1, 2, 3, 4]);
        assert_eq!(frame_indices(5, Some(1)), [0]);
        assert_eq!(frame_indices(0, Some(3)), [0; 0]);
        let scored = run(&video(&[[200, 10, 30]; 9]), Some(&tone(0.1)), Some(4));
        assert_eq!(scored.frames, 4);
        assert_eq!(scored.flags, [Flag::FramesSubsampled, Flag::ShortAudio]);
    }

    #[test]
    fn cosine_has_a_floor_and_no_nan() {
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 2.0]), 0.0);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-9);
    }
}
