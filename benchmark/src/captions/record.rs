//! One clip of the data set: what its name says, what describes it, what its media are, and where each of that is from.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::Wrong;
use super::json::fields;
use super::token::Token;

/// A clip as it stands on a line of a manifest. Fields that are not among these survive being read and written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Name of the clip, one of its kind; that of its file without `.mp4`.
    pub id: String,
    /// Id of the video that it is a part of.
    pub video_id: Option<String>,
    /// Where it starts in the video, in ms.
    pub start_ms: Option<u64>,
    /// Where it ends in the video, in ms.
    pub end_ms: Option<u64>,
    /// What is seen and heard.
    pub caption: Option<String>,
    /// What is seen.
    pub caption_video: Option<String>,
    /// What is heard.
    pub caption_audio: Option<String>,
    /// File with the picture.
    pub video_path: Option<String>,
    /// File with the sound, where that is another one.
    pub audio_path: Option<String>,
    /// Average frames per second.
    pub fps: Option<f64>,
    /// Number of frames.
    pub frames: Option<u64>,
    /// Width in pixels.
    pub width: Option<u64>,
    /// Height in pixels.
    pub height: Option<u64>,
    /// Samples of sound per second and channel.
    pub sample_rate: Option<u64>,
    /// Channels of sound.
    pub channels: Option<u64>,
    /// Length in seconds.
    pub duration_s: Option<f64>,
    /// Part of the data set: `train`, `val` or `test`.
    pub split: Option<String>,
    /// What is unusual about it.
    pub flags: Vec<String>,
    /// Where fields are from: name and JSON text.
    pub(crate) provenance: Vec<(String, String)>,
    /// Everything else: name and JSON text.
    pub(crate) other: Vec<(String, String)>,
}

/// Where a field is from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// Step that made it.
    pub stage: &'static str,
    /// What did the step.
    pub backend: String,
    /// Its model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Version of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_version: Option<String>,
    /// The rule in words, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// When, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<u64>,
}

impl Record {
    /// A clip of a video, from `start_ms` to `end_ms`.
    pub(crate) fn of_clip(id: &str, video_id: &str, start_ms: u64, end_ms: u64) -> Self {
        Self {
            id: id.to_owned(),
            video_id: Some(video_id.to_owned()),
            start_ms: Some(start_ms),
            end_ms: Some(end_ms),
            ..Self::default()
        }
    }

    /// Reads a line of a manifest. Where the id is a clip's name, what it says fills fields that are absent.
    pub(crate) fn parse(line: &str) -> Result<Self, Wrong> {
        let mut record = Self::default();
        for (name, value) in fields(line)? {
            match name.as_str() {
                "id" => record.id = string(&name, value)?.unwrap_or_default(),
                "video_id" => record.video_id = string(&name, value)?,
                "start_ms" => record.start_ms = whole(&name, value)?,
                "end_ms" => record.end_ms = whole(&name, value)?,
                "caption" => record.caption = string(&name, value)?,
                "caption_video" => record.caption_video = string(&name, value)?,
                "caption_audio" => record.caption_audio = string(&name, value)?,
                "video_path" => record.video_path = string(&name, value)?,
                "audio_path" => record.audio_path = string(&name, value)?,
                "fps" => record.fps = positive(&name, value)?,
                "frames" => record.frames = whole(&name, value)?,
                "width" => record.width = whole(&name, value)?,
                "height" => record.height = whole(&name, value)?,
                "sample_rate" => record.sample_rate = whole(&name, value)?,
                "channels" => record.channels = whole(&name, value)?,
                "duration_s" => record.duration_s = positive(&name, value)?,
                "split" => record.split = string(&name, value)?,
                "flags" => record.flags = strings(&name, value)?,
                "provenance" => record.provenance = map(&name, value)?,
                _ => record.other.push((name, value.to_owned())),
            }
        }
        if record.id.trim().is_empty() {
            return Err(Wrong::new("id", "none", "a string that names the clip"));
        }
        record.fill_from_id();
        Ok(record)
    }

    fn fill_from_id(&mut self) {
        let name = match self.id.ends_with(".mp4") {
            true => self.id.clone(),
            false => format!("{}.mp4", self.id),
        };
        let Some((token, "")) = Token::leading(&name) else {
            return;
        };
        self.video_id.get_or_insert_with(|| token.video_id.to_owned());
        if let (None, None, Ok((start, end))) = (self.start_ms, self.end_ms, token.times()) {
            (self.start_ms, self.end_ms) = (Some(start), Some(end));
        }
    }

    /// The record as one line of JSON, without its end. Fields that are absent are left out.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = Object::default();
        out.text("id", Some(&self.id));
        out.text("video_id", self.video_id.as_ref());
        out.number("start_ms", self.start_ms);
        out.number("end_ms", self.end_ms);
        out.text("caption", self.caption.as_ref());
        out.text("caption_video", self.caption_video.as_ref());
        out.text("caption_audio", self.caption_audio.as_ref());
        out.text("video_path", self.video_path.as_ref());
        out.text("audio_path", self.audio_path.as_ref());
        out.number("fps", self.fps);
        out.number("frames", self.frames);
        out.number("width", self.width);
        out.number("height", self.height);
        out.number("sample_rate", self.sample_rate);
        out.number("channels", self.channels);
        out.number("duration_s", self.duration_s);
        out.text("split", self.split.as_ref());
        let flags: Vec<String> = self.flags.iter().map(|flag| quoted(flag)).collect();
        out.raw("flags", &format!("[{}]", flags.join(",")));
        if !self.provenance.is_empty() {
            let mut inner = Object::default();
            for (name, value) in &self.provenance {
                inner.raw(name, value);
            }
            out.raw("provenance", &inner.finish());
        }
        for (name, value) in &self.other {
            out.raw(name, value);
        }
        out.finish()
    }

    /// Notes what is unusual, once.
    pub fn flag(&mut self, flag: &str) {
        if !self.flags.iter().any(|known| known == flag) {
            self.flags.push(flag.to_owned());
        }
    }

    /// Takes a note back.
    pub fn unflag(&mut self, flag: &str) {
        self.flags.retain(|known| known != flag);
    }

    /// Says where a field is from; an older word about it is replaced.
    pub fn stamp(&mut self, field: &str, from: &Provenance) {
        // A structure of strings and numbers always becomes JSON.
        let text = serde_json::to_string(from).unwrap_or_default();
        match self.provenance.iter_mut().find(|(known, _)| known == field) {
            Some((_, old)) => *old = text,
            None => self.provenance.push((field.to_owned(), text)),
        }
    }

    /// JSON text about where a field is from.
    #[must_use]
    pub fn provenance(&self, field: &str) -> Option<&str> {
        let found = self.provenance.iter().find(|(known, _)| known == field);
        found.map(|(_, text)| text.as_str())
    }

    /// JSON text of a field that is none of the manifest's own.
    #[must_use]
    pub fn other(&self, field: &str) -> Option<&str> {
        let found = self.other.iter().find(|(known, _)| known == field);
        found.map(|(_, text)| text.as_str())
    }

    /// Sets a field that is none of the manifest's own to a text.
    pub(crate) fn set_other(&mut self, field: &str, text: &str) {
        let text = quoted(text);
        match self.other.iter_mut().find(|(known, _)| known == field) {
            Some((_, old)) => *old = text,
            None => self.other.push((field.to_owned(), text)),
        }
    }

    /// Length in ms: end less start, else the length of its media. None where neither is known or the times are reversed.
    #[must_use]
    pub fn length_ms(&self) -> Option<u64> {
        match (self.start_ms, self.end_ms) {
            (Some(start), Some(end)) => end.checked_sub(start).filter(|length| *length > 0),
            _ => self.duration_s.map(|seconds| (seconds * 1000.0).round() as u64),
        }
    }

    /// The caption, unless it is empty.
    #[must_use]
    pub fn caption_text(&self) -> Option<&str> {
        self.caption.as_deref().filter(|text| !text.trim().is_empty())
    }

    /// The clip's file: what the record says, taken from `folder` where it is relative, else `ID.mp4` in `folder`.
    #[must_use]
    pub fn media(&self, folder: &Path) -> PathBuf {
        match &self.video_path {
            Some(path) => folder.join(path),
            None if self.id.ends_with(".mp4") => folder.join(&self.id),
            None => folder.join(format!("{}.mp4", self.id)),
        }
    }
}

/// A JSON object under construction.
#[derive(Default)]
struct Object(String);

impl Object {
    fn raw(&mut self, name: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        self.0.push_str(&quoted(name));
        self.0.push(':');
        self.0.push_str(value);
    }

    fn text(&mut self, name: &str, value: Option<&String>) {
        if let Some(value) = value {
            self.raw(name, &quoted(value));
        }
    }

    fn number(&mut self, name: &str, value: Option<impl Serialize>) {
        // What is no number becomes null, which is left out.
        let text = value.and_then(|value| serde_json::to_string(&value).ok());
        if let Some(text) = text.filter(|text| text != "null") {
            self.raw(name, &text);
        }
    }

    fn finish(mut self) -> String {
        if self.0.is_empty() {
            self.0.push('{');
        }
        self.0.push('}');
        self.0
    }
}

fn quoted(text: &str) -> String {
    // A string always becomes JSON.
    serde_json::to_string(text).unwrap_or_default()
}

fn string(name: &str, value: &str) -> Result<Option<String>, Wrong> {
    serde_json::from_str(value).map_err(|_| Wrong::new(name, value, "a string"))
}

fn strings(name: &str, value: &str) -> Result<Vec<String>, Wrong> {
    let read: Result<Option<Vec<String>>, _> = serde_json::from_str(value);
    let read = read.map_err(|_| Wrong::new(name, value, "a list of strings"))?;
    Ok(read.unwrap_or_default())
}

fn map(name: &str, value: &str) -> Result<Vec<(String, String)>, Wrong> {
    if value == "null" {
        return Ok(Vec::new());
    }
    let read = fields(value).map_err(|_| Wrong::new(name, value, "an object"))?;
    Ok(read
        .into_iter()
        .map(|(name, value)| (name, value.to_owned()))
        .collect())
}

/// A whole number; `250.0`, as tables write it that know no other numbers, is one.
fn whole(name: &str, value: &str) -> Result<Option<u64>, Wrong> {
    if value == "null" {
        return Ok(None);
    }
    let real = || {
        value
            .parse::<f64>()
            .ok()
            .filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x))
    };
    match value.parse().ok().or_else(|| real().map(|x| x as u64)) {
        Some(number) => Ok(Some(number)),
        None => Err(Wrong::new(name, value, "a whole number, 0 or more")),
    }
}

fn positive(name: &str, value: &str) -> Result<Option<f64>, Wrong> {
    if value == "null" {
        return Ok(None);
    }
    match value.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(Some(number)),
        _ => Err(Wrong::new(name, value, "a finite number, 0 or more")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_survive_letter_by_letter() {
        let line = r#"{"id":"a","flags":["x"],"provenance":{"caption":{"stage":"merge","more":1.10}},"score":0.10000000000000001,"big":123456789012345678901234567890,"nested":{"b":[1, 2],"a":"\u00e9"}}"#;
        let mut record = Record::parse(line).unwrap();
        assert_eq!(record.to_json(), line);
        record.caption = Some("A bell.".to_owned());
        record.stamp(
            "split",
            &Provenance {
                stage: "split",
                backend: "hash".to_owned(),
                ..Provenance::default()
            },
        );
        let again = Record::parse(&record.to_json()).unwrap();
        assert_eq!(again, record);
        assert_eq!(again.other("score"), Some("0.10000000000000001"));
        assert_eq!(
            again.provenance("caption"),
            Some(r#"{"stage":"merge","more":1.10}"#)
        );
        assert_eq!(
            again.provenance("split"),
            Some(r#"{"stage":"split","backend":"hash"}"#)
        );
    }

    #[test]
    fn numbers_and_texts_survive() {
        let line = r#"{"id":"P2RPnCJZMBo_290000_300000","video_id":"P2RPnCJZMBo","start_ms":290000,"end_ms":300000,"caption":"A \"dog\"\nbarks\u0007.","fps":29.97002997002997,"frames":300,"duration_s":10.01,"flags":[]}"#;
        let record = Record::parse(line).unwrap();
        assert_eq!(
            (record.fps, record.frames, record.length_ms()),
            (Some(29.97002997002997), Some(300), Some(10_000))
        );
        assert_eq!(record.to_json(), line);
        let short =
            Record::parse(r#"{"id":"P2RPnCJZMBo_290000_300000.mp4","frames":250.0,"width":null}"#).unwrap();
        assert_eq!((short.start_ms, short.end_ms), (Some(290_000), Some(300_000)));
        assert_eq!(
            (short.video_id.as_deref(), short.frames, short.width),
            (Some("P2RPnCJZMBo"), Some(250), None)
        );
        assert_eq!(
            short.media(Path::new("m")),
            Path::new("m/P2RPnCJZMBo_290000_300000.mp4")
        );
    }

    #[test]
    fn fields_of_another_kind_are_named() {
        for (line, field) in [
            (r#"{"caption":"x"}"#, "id"),
            (r#"{"id":""}"#, "id"),
            (r#"{"id":5}"#, "id"),
            (r#"{"id":"a","caption":5}"#, "caption"),
            (r#"{"id":"a","frames":1.5}"#, "frames"),
            (r#"{"id":"a","frames":-1}"#, "frames"),
            (r#"{"id":"a","width":"5"}"#, "width"),
            (r#"{"id":"a","fps":-2}"#, "fps"),
            (r#"{"id":"a","fps":1e999}"#, "fps"),
            (r#"{"id":"a","flags":"x"}"#, "flags"),
            (r#"{"id":"a","provenance":[]}"#, "provenance"),
            (r#"{"id":"a","id":"b"}"#, "id"),
            ("not json", "line"),
        ] {
            assert_eq!(Record::parse(line).unwrap_err().field, field, "{line}");
        }
    }
}
