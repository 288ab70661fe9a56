//! The table `[distributed.outer]` of a recipe, and the rule that it stands for.

use serde::{Deserialize, Serialize};

/// Which algorithm: the values that the table leaves out.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OuterMethod {
    /// Means arrive a round late and hide behind its work; updates are divided by the staleness gap.
    #[default]
    Co2,
    /// Means of the same round, with momentum (arXiv 1910.00643).
    Slowmo,
    /// Means of the same round as they are.
    Local,
    /// Means of the same round, with Nesterov's momentum (arXiv 2311.08105).
    Diloco,
}

/// What divides stale updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gap {
    /// Nothing.
    Off,
    /// One gap for all parameters.
    Global,
    /// One for each tensor.
    Tensor,
    /// Always the same.
    Constant(f64),
}

/// Local steps and outer updates. What is left out is as the method has it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OuterOptions {
    /// `co2`, `slowmo`, `local` or `diloco`.
    pub method: OuterMethod,
    /// Inner steps of a round, tau; 0 measures a step and an average at the start, and takes as few as hide the average.
    pub inner_steps: usize,
    /// Outer learning rate alpha: 1, of `diloco` 0.7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Outer momentum beta: of `co2` and `slowmo` by the number of workers, 0 up to 16 and 0.6 beyond 64; of `diloco` 0.9.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Largest absolute value of an element of the momentum; 0 does not limit it.
    pub clip: f64,
    /// Largest norm of the momentum; 0 does not limit it.
    pub clip_norm: f64,
    /// `off`, `global` or `tensor`; of `co2` `global`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<GapKind>,
    /// A constant in the place of the gap, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap_constant: Option<f64>,
    /// Consecutive ranks that are one worker and sum their gradients at each step: those of a host. 0 takes those that share
    /// sequences.
    pub node: usize,
}

/// Over what a gap is taken.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GapKind {
    /// No gap.
    Off,
    /// All parameters.
    Global,
    /// Each tensor.
    Tensor,
}

/// The outer update, with all its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Whether means arrive a round late.
    pub stale: bool,
    /// alpha.
    pub lr: f64,
    /// beta.
    pub momentum: f64,
    /// Whether the step looks ahead by the momentum.
    pub nesterov: bool,
    /// Largest absolute value of an element of the momentum, 0 for none.
    pub clip: f64,
    /// Largest norm of the momentum, 0 for none.
    pub clip_norm: f64,
    /// What divides stale updates.
    pub gap: Gap,
}

impl OuterOptions {
    /// The rule for so many workers.
    pub fn rule(&self, workers: usize) -> Rule {
        let by_size = match workers {
            0..=16 => 0.0,
            17..=32 => 0.2,
            33..=64 => 0.5,
            _ => 0.6,
        };
        let (stale, lr, momentum, nesterov, gap) = match self.method {
            OuterMethod::Co2 => (true, 1.0, by_size, false, GapKind::Global),
            OuterMethod::Slowmo => (false, 1.0, by_size, false, GapKind::Off),
            OuterMethod::Local => (false, 1.0, 0.0, false, GapKind::Off),
            OuterMethod::Diloco => (false, 0.7, 0.9, true, GapKind::Off),
        };
        Rule {
            stale,
            lr: self.lr.unwrap_or(lr),
            momentum: self.momentum.unwrap_or(momentum),
            nesterov,
            clip: self.clip,
            clip_norm: self.clip_norm,
            gap: match (self.gap_constant, self.gap.unwrap_or(gap)) {
                (Some(constant), _) => Gap::Constant(constant),
                (None, GapKind::Off) => Gap::Off,
                (None, GapKind::Global) => Gap::Global,
                (None, GapKind::Tensor) => Gap::Tensor,
            },
        }
    }

    /// The first field that makes no sense: its name, what was found, what was expected.
    pub fn wrong(&self) -> Option<(&'static str, String, String)> {
        let limit = |x: f64| x >= 0.0 && x.is_finite();
        let stale = self.method == OuterMethod::Co2;
        let gaps = self.gap.is_some_and(|gap| gap != GapKind::Off) || self.gap_constant.is_some();
        let rules = [
            (
                self.lr.is_none_or(|lr| lr > 0.0 && lr.is_finite()),
                "distributed.outer.lr",
                format!("{:?}", self.lr.unwrap_or_default()),
                "more than 0",
            ),
            (
                self.momentum.is_none_or(|beta| (0.0..1.0).contains(&beta)),
                "distributed.outer.momentum",
                format!("{:?}", self.momentum.unwrap_or_default()),
                "0 or more and below 1",
            ),
            (
                limit(self.clip),
                "distributed.outer.clip",
                self.clip.to_string(),
                "0 or more",
            ),
            (
                limit(self.clip_norm),
                "distributed.outer.clip_norm",
                self.clip_norm.to_string(),
                "0 or more",
            ),
            (
                self.gap_constant.is_none_or(|gap| gap >= 1.0 && gap.is_finite()),
                "distributed.outer.gap_constant",
                format!("{:?}", self.gap_constant.unwrap_or_default()),
                "1 or more",
            ),
            (
                stale || !gaps,
                "distributed.outer.gap",
                "a gap".to_owned(),
                "none, as only co2 has stale means",
            ),
            (
                stale || self.inner_steps > 0,
                "distributed.outer.inner_steps",
                "0".to_owned(),
                "1 or more, as only co2 hides averages",
            ),
        ];
        rules
            .into_iter()
            .find(|(holds, ..)| !holds)
            .map(|(_, field, found, expected)| (field, found, expected.to_owned()))
    }
}
