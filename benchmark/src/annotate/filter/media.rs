//! Filters of what is seen and heard.

use super::super::config::Filters;
use super::super::media::Media;
use super::super::stage::{ClipFilter, Verdict, When};
use crate::captions::Record;

/// Wants picture and sound, a length, a rate and a size within bounds.
#[derive(Clone, Debug)]
pub struct MediaFilter {
    min_duration_s: f64,
    max_duration_s: f64,
    min_fps: f64,
    min_side: u64,
}

impl MediaFilter {
    /// With the bounds of the settings.
    #[must_use]
    pub fn new(settings: &Filters) -> Self {
        Self {
            min_duration_s: settings.min_duration_s,
            max_duration_s: settings.max_duration_s,
            min_fps: settings.min_fps,
            min_side: settings.min_side,
        }
    }
}

impl ClipFilter for MediaFilter {
    fn when(&self) -> When {
        When::Opened
    }

    fn judge(&self, _: &Record, media: Option<&Media>) -> Verdict {
        let Some(media) = media else {
            return Verdict::Keep;
        };
        let info = &media.info;
        let Some(video) = &info.video else {
            return Verdict::Drop("no_video");
        };
        if info.sound.is_none() {
            return Verdict::Drop("no_audio");
        }
        let duration_s = media.duration_s();
        // A container that does not tell its length is judged by nothing.
        if duration_s > 0.0 && duration_s < self.min_duration_s {
            Verdict::Drop("too_short")
        } else if duration_s > self.max_duration_s {
            Verdict::Drop("too_long")
        } else if video.fps > 0.0 && video.fps < self.min_fps {
            Verdict::Drop("low_fps")
        } else if (video.width.min(video.height) as u64) < self.min_side {
            Verdict::Drop("too_small")
        } else {
            Verdict::Keep
        }
    }
}

/// Wants something to hear: the level of the whole, and the share of pieces of 50 ms below that level.
#[derive(Clone, Debug)]
pub struct Silence {
    level_db: f64,
    share: f64,
}

impl Silence {
    /// With the bounds of the settings.
    #[must_use]
    pub fn new(settings: &Filters) -> Self {
        Self {
            level_db: settings.silence_db,
            share: settings.silent_share,
        }
    }
}

impl ClipFilter for Silence {
    fn when(&self) -> When {
        When::Decoded
    }

    fn judge(&self, _: &Record, media: Option<&Media>) -> Verdict {
        match media.and_then(|media| media.loudness) {
            Some(loudness) if loudness.rms_db < self.level_db || loudness.silent_share > self.share => {
                Verdict::Drop("silent")
            }
            _ => Verdict::Keep,
        }
    }
}

/// Notes clips in which nothing moves.
#[derive(Clone, Debug)]
pub struct Still {
    /// Mean difference of grey between frames half a second apart, of 0 to 1, below which nothing moves.
    pub difference: f64,
}

impl ClipFilter for Still {
    fn when(&self) -> When {
        When::Decoded
    }

    fn judge(&self, _: &Record, media: Option<&Media>) -> Verdict {
        match media.and_then(|media| media.motion) {
            Some(motion) if motion < self.difference => Verdict::Flag("static"),
            _ => Verdict::Keep,
        }
    }
}

#[cfg(test)]
mod tests {
    use fulgur_datasets::media::{Info, SoundInfo, VideoInfo};

    use super::super::super::media::Loudness;
    use super::*;

    fn media(duration_s: f64, fps: f64, size: (usize, usize)) -> Media {
        Media {
            info: Info {
                duration_s,
                video: Some(VideoInfo {
                    codec: "h264".into(),
                    width: size.0,
                    height: size.1,
                    fps,
                    frame_count: 0,
                    duration_s,
                }),
                sound: Some(SoundInfo {
                    codec: "aac".into(),
                    channels: 1,
                    sample_rate: 16_000,
                    duration_s,
                }),
                ..Info::default()
            },
            ..Media::default()
        }
    }

    #[test]
    fn media_are_judged_by_what_the_container_says() {
        let filter = MediaFilter::new(&Filters::default());
        let judge = |media: &Media| filter.judge(&Record::default(), Some(media));
        assert_eq!(judge(&media(2.0, 8.0, (128, 300))), Verdict::Keep);
        assert_eq!(judge(&media(0.0, 0.0, (128, 300))), Verdict::Keep);
        assert_eq!(judge(&media(1.99, 25.0, (640, 360))), Verdict::Drop("too_short"));
        assert_eq!(judge(&media(30.01, 25.0, (640, 360))), Verdict::Drop("too_long"));
        assert_eq!(
            judge(&media(36_000.0, 25.0, (640, 360))),
            Verdict::Drop("too_long")
        );
        assert_eq!(judge(&media(10.0, 7.9, (640, 360))), Verdict::Drop("low_fps"));
        assert_eq!(judge(&media(10.0, 25.0, (640, 127))), Verdict::Drop("too_small"));
        let mut deaf = media(10.0, 25.0, (640, 360));
        deaf.info.sound = None;
        assert_eq!(judge(&deaf), Verdict::Drop("no_audio"));
        deaf.info.video = None;
        assert_eq!(judge(&deaf), Verdict::Drop("no_video"));
        assert_eq!(filter.judge(&Record::default(), None), Verdict::Keep);
    }

    #[test]
    fn silence_is_a_level_or_a_share() {
        let filter = Silence::new(&Filters::default());
        let judge = |rms_db, silent_share| {
            let media = Media {
                loudness: Some(Loudness { rms_db, silent_share }),
                ..Media::default()
            };
            filter.judge(&Record::default(), Some(&media))
        };
        assert_eq!(judge(-59.0, 0.9), Verdict::Keep);
        assert_eq!(judge(-61.0, 0.0), Verdict::Drop("silent"));
        assert_eq!(judge(f64::NEG_INFINITY, 1.0), Verdict::Drop("silent"));
        assert_eq!(judge(-20.0, 0.91), Verdict::Drop("silent"));
        assert_eq!(
            filter.judge(&Record::default(), Some(&Media::default())),
            Verdict::Keep
        );
    }

    #[test]
    fn still_clips_are_noted() {
        let filter = Still {
            difference: 1.0 / 255.0,
        };
        let judge = |motion| {
            let media = Media {
                motion,
                ..Media::default()
            };
            filter.judge(&Record::default(), Some(&media))
        };
        assert_eq!(judge(Some(0.003)), Verdict::Flag("static"));
        assert_eq!((judge(Some(0.004)), judge(None)), (Verdict::Keep, Verdict::Keep));
    }
}
