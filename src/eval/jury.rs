//! The judges with the names of their classes matched to those of the data.

use candle_core::Result;
use fulgur_benchmark::judge::{JudgeConfig, Judges, Verdict, onset};
use fulgur_datasets::scenes::{ClipSpec, Motion, Scene, Timing};
use fulgur_datasets::things::Things;

use super::figures::Truth;
use crate::train::tasks::clips::{HostClip, frames_tensor, samples_tensor, to_unit};

/// Samples a second that the judges hear.
pub(super) const SAMPLE_RATE: u32 = 16_000;
/// How far beyond the part of the clip that a prompt names an event still counts as in time, in seconds of a clip of
/// 4 s: half of the gap to the next part.
const TIME_MARGIN_S: f64 = 0.2;

/// Judges that do not know all that they would be asked about.
#[derive(Debug, thiserror::Error)]
#[error(
    "{field}: found no `{name}` among {known} names, expected every one of the data; train judges on this data"
)]
pub struct ClassError {
    field: &'static str,
    name: String,
    known: usize,
}

/// Judges who know every thing and motion of the data.
pub struct Jury {
    judges: Judges,
    spec: ClipSpec,
    /// Class of every thing of the data.
    things: Vec<usize>,
    /// Class of every motion.
    motions: Vec<usize>,
}

/// Size, rate and length of the clips that judges of this shape look at.
pub fn clip_spec(config: &JudgeConfig) -> ClipSpec {
    ClipSpec {
        width: config.size,
        height: config.size,
        fps: config.fps,
        duration_s: config.duration_s(),
        sample_rate: SAMPLE_RATE,
    }
}

impl Jury {
    /// Matches the classes of `judges` by name; they may know more than the data holds, and in another order.
    ///
    /// # Errors
    /// A thing or motion that the judges have no name for.
    pub fn new(judges: Judges, things: &Things) -> std::result::Result<Self, ClassError> {
        let class = |field, names: &[String], wanted: &str| {
            let found = names.iter().position(|name| name == wanted);
            found.ok_or_else(|| ClassError {
                field,
                name: wanted.to_owned(),
                known: names.len(),
            })
        };
        let config = judges.config();
        let things = things
            .iter()
            .map(|thing| class("things", &config.things, &thing.id));
        let motions = Motion::ALL
            .iter()
            .map(|motion| class("motions", &config.motions, motion.name()));
        Ok(Self {
            spec: clip_spec(config),
            things: things.collect::<std::result::Result<_, _>>()?,
            motions: motions.collect::<std::result::Result<_, _>>()?,
            judges,
        })
    }

    /// Size, rate and length of the clips that are judged.
    pub fn spec(&self) -> &ClipSpec {
        &self.spec
    }

    /// Names of the things and motions, in the order of their classes.
    pub fn names(&self) -> (&[String], &[String]) {
        let config = self.judges.config();
        (&config.things, &config.motions)
    }

    /// What the caption of a scene asks for; `None` of a scene without a thing.
    pub fn truth(&self, scene: &Scene) -> Option<Truth> {
        let actor = scene.actors.first()?;
        let duration_s = self.spec.duration_s;
        let margin = TIME_MARGIN_S * duration_s / 4.0;
        let time_s = (actor.timing != Timing::Unsaid).then(|| {
            let (from, to) = actor.timing.range(duration_s);
            (from - margin, to + margin)
        });
        Some(Truth {
            thing: self.things[actor.thing],
            motion: self.motions[actor.motion.class()],
            time_s,
        })
    }

    /// Verdicts about clips of [`Self::spec`], each with the onset of its sound in seconds.
    ///
    /// # Errors
    /// Clips of another size, or arithmetic that fails on the device.
    pub fn judge(
        &self,
        clips: &[HostClip],
        device: &candle_core::Device,
    ) -> Result<Vec<(Verdict, Option<f64>)>> {
        let frames = to_unit(&frames_tensor(clips, &self.spec)?.to_device(device)?)?;
        let samples = samples_tensor(clips, &self.spec)?.to_device(device)?;
        let verdicts = self.judges.judge(&frames, &samples)?;
        let onsets = clips
            .iter()
            .map(|clip| onset(&clip.samples).map(|onset| onset.time_s));
        Ok(verdicts.into_iter().zip(onsets).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use fulgur_datasets::scenes::{Composer, Options};
    use fulgur_lightnet::params::Params;

    fn judges(things: &[&str]) -> Judges {
        let config = JudgeConfig {
            things: things.iter().map(|&name| name.to_owned()).collect(),
            motions: Motion::ALL
                .iter()
                .rev()
                .map(|motion| motion.name().to_owned())
                .collect(),
            size: 24,
            frames: 12,
            fps: 12.0,
            samples: 16_000,
            dim: 64,
            depth: 1,
        };
        Judges::new(&config, &Params::random(1, &Device::Cpu).builder()).unwrap()
    }

    #[test]
    fn classes_are_matched_by_name_and_times_by_the_caption() {
        let jury = Jury::new(
            judges(&["other", "thing_001", "thing_000"]),
            &Things::synthetic(2),
        )
        .unwrap();
        let options = Options {
            clip: *jury.spec(),
            ..Options::default()
        };
        let composer = Composer::new(Things::synthetic(2), &[], options).unwrap();
        let mut timed = 0;
        for scene in composer.held_out_prompts(40) {
            let (truth, actor) = (jury.truth(&scene).unwrap(), &scene.actors[0]);
            let (things, motions) = jury.names();
            assert_eq!(things[truth.thing], actor.id);
            assert_eq!(motions[truth.motion], actor.motion.name());
            assert_eq!(truth.time_s.is_some(), actor.timing != Timing::Unsaid);
            if let Some((from, to)) = truth.time_s {
                timed += 1;
                assert!((from..to).contains(&actor.contact_s), "{from} {to}");
                assert!(to - from < 0.3, "a third of a second at most: {from} {to}");
            }
        }
        assert!((1..40).contains(&timed));
    }

    #[test]
    fn an_unknown_thing_is_named() {
        let words = Jury::new(judges(&["thing_000"]), &Things::synthetic(2))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(
            words.starts_with("things: found no `thing_001` among 1 names"),
            "{words}"
        );
    }
}
