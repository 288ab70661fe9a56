//! What looks at one clip at a time for the metrics of [`super::suite`].

use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use fulgur_datasets::media::{Sound, Video, resample};

use super::joint::{self, JointEncoder, Part, Vectors};
use super::suite::Reading;
use super::{av_align, javis, sync};
use crate::avhscore::{self, cosine};
use crate::encoder::{EncodeError, Encoder};
use crate::features::clap::ClapEncoder;
use crate::features::frames::Framing;
use crate::features::i3d::{self, I3d};
use crate::features::panns::{self, Panns};
use crate::features::vggish::{self, Vggish};
use crate::features::{FeatureError, checkpoint};

/// A decoded clip and the text that it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt, where it is known.
    pub prompt: Option<&'a str>,
    /// The picture.
    pub video: Option<&'a Video>,
    /// The sound.
    pub sound: Option<&'a Sound>,
    /// Raised by another thread to give up.
    pub cancel: &'a AtomicBool,
}

/// Why a clip has no reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The user stopped the work.
    Cancelled,
    /// The clip cannot be read so, in words.
    Skip(String),
}

impl<E: std::fmt::Display> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Skip(error.to_string())
    }
}

/// Looks at clips.
pub trait Reader: Send + Sync {
    /// Network, checkpoint and version of the preprocessing: figures of different ones do not compare.
    fn feature(&self) -> String;

    /// Reads a clip.
    ///
    /// # Errors
    /// It has no picture, sound or prompt where they are needed, is too short, or the network fails.
    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal>;
}

fn video<'a>(sample: &Sample<'a>) -> Result<&'a Video, Refusal> {
    let video = sample.video.filter(|video| video.frame_count > 0);
    video.ok_or_else(|| Refusal::Skip("no video stream".to_owned()))
}

fn sound<'a>(sample: &Sample<'a>) -> Result<&'a Sound, Refusal> {
    let sound = sample.sound.filter(|sound| !sound.is_empty());
    let sound = sound.ok_or_else(|| Refusal::Skip("no audio stream".to_owned()))?;
    // A maximum with a floor would quietly make silence of them.
    if sound.samples.iter().all(|value| value.is_finite()) {
        Ok(sound)
    } else {
        Err(Refusal::Skip("sound with samples that are not finite".to_owned()))
    }
}

fn prompt<'a>(sample: &Sample<'a>) -> Result<&'a str, Refusal> {
    let prompt = sample.prompt.filter(|prompt| !prompt.trim().is_empty());
    prompt.ok_or_else(|| Refusal::Skip("no prompt".to_owned()))
}

/// The mean of the channels without its own mean, at `rate`.
fn centred(sound: &Sound, rate: u32) -> Result<Vec<f32>, Refusal> {
    let mut mono = sound.mono();
    let sum: f64 = mono.samples.iter().map(|&sample| f64::from(sample)).sum();
    let mean = (sum / mono.len().max(1) as f64) as f32;
    mono.samples.iter_mut().for_each(|sample| *sample -= mean);
    Ok(resample(&mono, rate)?.samples)
}

/// [`i3d`].
#[derive(Debug)]
pub struct I3dReader {
    network: I3d,
    framing: Framing,
    device: Device,
    feature: String,
}

impl I3dReader {
    /// Loads the network of `dir`.
    ///
    /// # Errors
    /// As [`I3d::load`].
    pub fn load(dir: &Path, framing: Framing, device: &Device) -> Result<Self, FeatureError> {
        let compat = if framing.upper_half { ", javisbench" } else { "" };
        Ok(Self {
            network: I3d::load(dir, device)?,
            feature: format!(
                "i3d logits, checkpoint {}, preprocessing i3d-1 of {} frames{compat}",
                checkpoint(dir)?,
                framing.frames
            ),
            framing,
            device: device.clone(),
        })
    }
}

impl Reader for I3dReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let clip = self
            .framing
            .clip(video(sample)?, i3d::SIZE)?
            .to_device(&self.device)?;
        let logits = self.network.forward(&clip)?;
        Ok(Reading::Rows(crate::features::rows(&logits)?))
    }
}

/// [`vggish`].
#[derive(Debug)]
pub struct VggishReader {
    network: Vggish,
    feature: String,
}

impl VggishReader {
    /// Loads the network of `dir`.
    ///
    /// # Errors
    /// As [`Vggish::load`].
    pub fn load(dir: &Path, device: &Device) -> Result<Self, FeatureError> {
        Ok(Self {
            network: Vggish::load(dir, device)?,
            feature: format!("vggish, checkpoint {}, preprocessing vggish-1", checkpoint(dir)?),
        })
    }
}

impl Reader for VggishReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let rows = self.network.embed(&centred(sound(sample)?, vggish::RATE)?)?;
        if rows.is_empty() {
            return Err(Refusal::Skip("sound shorter than 0.975 s".to_owned()));
        }
        Ok(Reading::Rows(rows))
    }
}

/// [`panns`].
#[derive(Debug)]
pub struct PannsReader {
    network: Panns,
    feature: String,
}

impl PannsReader {
    /// Loads the network of `dir`.
    ///
    /// # Errors
    /// As [`Panns::load`].
    pub fn load(dir: &Path, device: &Device) -> Result<Self, FeatureError> {
        Ok(Self {
            network: Panns::load(dir, device)?,
            feature: format!(
                "panns cnn14-16k, checkpoint {}, preprocessing panns-1",
                checkpoint(dir)?
            ),
        })
    }
}

impl Reader for PannsReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let heard = self.network.embed(&centred(sound(sample)?, panns::RATE)?)?;
        let (embedding, logits) =
            heard.ok_or_else(|| Refusal::Skip("sound shorter than 0.31 s".to_owned()))?;
        Ok(Reading::Classes { embedding, logits })
    }
}

/// [`crate::features::clap`].
#[derive(Debug)]
pub struct ClapReader {
    encoder: ClapEncoder,
    feature: String,
}

impl ClapReader {
    /// Loads the encoder of `dir`.
    ///
    /// # Errors
    /// As [`ClapEncoder::load`].
    pub fn load(dir: &Path, device: &Device) -> Result<Self, FeatureError> {
        Ok(Self {
            encoder: ClapEncoder::load(dir, device)?,
            feature: format!(
                "clap htsat-unfused, checkpoint {}, preprocessing clap-1",
                checkpoint(dir)?
            ),
        })
    }
}

impl Reader for ClapReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let prompt = prompt(sample)?;
        let wave = resample(&sound(sample)?.mono(), self.encoder.rate())?;
        let heard = self.encoder.sound(&wave.samples)?;
        Ok(Reading::Value(cosine(&heard, &self.encoder.text(prompt)?)))
    }
}

/// [`av_align`].
#[derive(Clone, Copy, Debug)]
pub struct AlignReader;

impl Reader for AlignReader {
    fn feature(&self) -> String {
        "flow as OpenCV, onsets as librosa, preprocessing av-align-1".to_owned()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let (video, sound) = (video(sample)?, sound(sample)?);
        Ok(Reading::Value(av_align::av_align(video, sound)?))
    }
}

/// [`sync`].
#[derive(Clone, Copy, Debug)]
pub struct SyncReader;

impl Reader for SyncReader {
    fn feature(&self) -> String {
        "onsets beside motion, preprocessing av-sync-2".to_owned()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let found = sync::probe(video(sample)?, sound(sample)?)?;
        let found = found.ok_or_else(|| Refusal::Skip("no onset or no motion to compare".to_owned()))?;
        Ok(Reading::Offset(found))
    }
}

/// Vectors of the parts of clips in the space of a joint encoder: [`joint`].
pub struct JointReader {
    encoder: Box<dyn JointEncoder>,
    parts: Vec<Part>,
    feature: String,
}

impl JointReader {
    /// Reads these `parts`; `checkpoint` names the encoder's weights.
    pub fn new(encoder: Box<dyn JointEncoder>, parts: Vec<Part>, checkpoint: &str) -> Self {
        let feature = format!("{}, checkpoint {checkpoint}, preprocessing ib-1", encoder.name());
        Self {
            encoder,
            parts,
            feature,
        }
    }
}

impl std::fmt::Debug for JointReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JointReader({})", self.feature)
    }
}

impl Reader for JointReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let vector = |part: Part| -> Result<Vec<f32>, Refusal> {
            let encoded = match part {
                Part::Video => self.encoder.video(video(sample)?),
                Part::Sound => self.encoder.sound(sound(sample)?),
                Part::Text => self.encoder.text(prompt(sample)?),
            };
            encoded.map_err(refusal)
        };
        let mut vectors = Vectors::default();
        for &part in &self.parts {
            let vector = match vector(part) {
                Ok(vector) => Ok(vector),
                Err(Refusal::Cancelled) => return Err(Refusal::Cancelled),
                Err(Refusal::Skip(reason)) => Err(reason),
            };
            vectors.0.insert(part, vector);
        }
        Ok(Reading::Joint(vectors))
    }
}

/// CLIPSIM: [`joint::clipsim`].
pub struct ClipReader {
    encoder: Box<dyn JointEncoder>,
    feature: String,
}

impl ClipReader {
    /// `checkpoint` names the encoder's weights.
    pub fn new(encoder: Box<dyn JointEncoder>, checkpoint: &str) -> Self {
        let feature = format!(
            "{}, checkpoint {checkpoint}, {} frames",
            encoder.name(),
            joint::CLIPSIM_FRAMES
        );
        Self { encoder, feature }
    }
}

impl std::fmt::Debug for ClipReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClipReader({})", self.feature)
    }
}

impl Reader for ClipReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let prompt = prompt(sample)?;
        let value = joint::clipsim(&*self.encoder, video(sample)?, prompt, sample.cancel);
        Ok(Reading::Value(value.map_err(refusal)?))
    }
}

/// An encoder of frames and sounds, with AVHScore or JavisScore.
pub struct EncoderReader {
    encoder: Box<dyn Encoder>,
    windows: Option<javis::Windows>,
    feature: String,
}

impl EncoderReader {
    /// AVHScore, or JavisScore in `windows`; `checkpoint` names the encoder's weights.
    pub fn new(encoder: Box<dyn Encoder>, windows: Option<javis::Windows>, checkpoint: &str) -> Self {
        let how = match windows {
            None => "all frames".to_owned(),
            Some(windows) => format!(
                "windows of {} s that overlap by {} s",
                windows.window_s, windows.overlap_s
            ),
        };
        let feature = format!("encoder {}, checkpoint {checkpoint}, {how}", encoder.name());
        Self {
            encoder,
            windows,
            feature,
        }
    }
}

impl std::fmt::Debug for EncoderReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EncoderReader({})", self.feature)
    }
}

/// A stop is no reason to skip a clip.
fn refusal(error: EncodeError) -> Refusal {
    match error {
        EncodeError::Cancelled => Refusal::Cancelled,
        other => Refusal::Skip(other.to_string()),
    }
}

impl Reader for EncoderReader {
    fn feature(&self) -> String {
        self.feature.clone()
    }

    fn read(&self, sample: &Sample<'_>) -> Result<Reading, Refusal> {
        let (video, sound) = (video(sample)?, sound(sample)?);
        let value = match self.windows {
            Some(windows) => {
                javis::score(&*self.encoder, video, sound, windows, sample.cancel).map_err(refusal)?
            }
            None => {
                let score = avhscore::score(&*self.encoder, video, Some(sound), None, sample.cancel);
                let score = score.map_err(refusal)?;
                score
                    .avhscore
                    .ok_or_else(|| Refusal::Skip(score.reason.unwrap_or_default()))?
            }
        };
        Ok(Reading::Value(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything is the same vector.
    struct Same;

    impl JointEncoder for Same {
        fn name(&self) -> &str {
            "same"
        }
        fn frames(&self, frames: &[&[u8]], _: usize, _: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
            Ok(vec![vec![1.0, 2.0]; frames.len()])
        }
        fn text(&self, _: &str) -> Result<Vec<f32>, EncodeError> {
            Ok(vec![2.0, 4.0])
        }
    }

    #[test]
    fn what_is_missing_is_the_reason_to_skip() {
        let go = AtomicBool::new(false);
        let video = Video::new(vec![0; 3 * 16], 4, 4, 8.0).unwrap();
        let sound = Sound::new(vec![0.0; 100], 1, 8000).unwrap();
        let whole = Sample {
            prompt: Some("a bell"),
            video: Some(&video),
            sound: Some(&sound),
            cancel: &go,
        };
        let clipsim = ClipReader::new(Box::new(Same), "0123");
        assert_eq!(clipsim.feature(), "same, checkpoint 0123, 48 frames");
        assert!(matches!(clipsim.read(&whole), Ok(Reading::Value(value)) if (value - 1.0).abs() < 1e-6));
        let skip = |reader: &dyn Reader, sample: &Sample<'_>| match reader.read(sample) {
            Err(Refusal::Skip(reason)) => reason,
            other => format!("{other:?}"),
        };
        let blank = Sample {
            prompt: Some(" "),
            ..whole
        };
        assert_eq!(skip(&clipsim, &blank), "no prompt");
        let joint = JointReader::new(Box::new(Same), vec![Part::Sound, Part::Text], "0123");
        let Ok(Reading::Joint(vectors)) = joint.read(&blank) else {
            panic!("no vectors")
        };
        let reasons = [Part::Sound, Part::Text].map(|part| vectors.0[&part].clone().unwrap_err());
        assert_eq!(reasons, ["same hears no sounds", "no prompt"]);
        let mute = Sample { sound: None, ..whole };
        assert_eq!(skip(&AlignReader, &mute), "no audio stream");
        let broken = Sound::new(vec![0.0, f32::NAN], 1, 8000).unwrap();
        let odd = Sample {
            sound: Some(&broken),
            ..whole
        };
        assert_eq!(skip(&AlignReader, &odd), "sound with samples that are not finite");
        let blind = Sample { video: None, ..whole };
        assert_eq!(skip(&AlignReader, &blind), "no video stream");
        assert_eq!(skip(&SyncReader, &whole), "no onset or no motion to compare");
        go.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(clipsim.read(&whole), Err(Refusal::Cancelled));
    }

    #[test]
    fn sounds_lose_their_mean() {
        let sound = Sound::new(vec![1.0, 0.5, 0.0, 0.5], 2, 16_000).unwrap();
        assert_eq!(centred(&sound, 16_000).unwrap(), [0.25, -0.25]);
    }
}
