//! Names of clips: `P2RPnCJZMBo_290000_300000.mp4` is the part from 290 s to 300 s of the video `P2RPnCJZMBo`.

/// Characters of a video's id.
const ID: usize = 11;
const ENDING: &str = ".mp4";
/// Largest time in ms: beyond it readers of JSON that know only double precision would be off.
pub(crate) const LAST_MS: u64 = (1 << 53) - 1;

/// A name of the form `[A-Za-z0-9_-]{11}_<start_ms>_<end_ms>.mp4`. The id may hold `_` and `-` itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// The whole name.
    pub text: &'a str,
    /// Id of the video.
    pub video_id: &'a str,
    start: &'a str,
    end: &'a str,
}

/// Why a clip of a well-formed name is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It does not end after it starts.
    EndNotAfterStart,
    /// A time beyond 2^53 - 1 ms.
    TimeTooLarge,
    /// Its line is longer than any caption.
    LineTooLong,
}

impl<'a> Token<'a> {
    /// The name that a line begins with, and what follows it. A name ends with the text or at white space.
    ///
    /// ```
    /// use fulgur_benchmark::captions::Token;
    /// let (token, rest) = Token::leading("-a_b_c-d_1__0_9500.mp4 A bell.").unwrap();
    /// assert_eq!((token.video_id, token.times(), rest), ("-a_b_c-d_1_", Ok((0, 9500)), " A bell."));
    /// assert!(Token::leading("P2RPnCJZMBo_0_9500.mp4x A bell.").is_none());
    /// ```
    #[must_use]
    pub fn leading(line: &'a str) -> Option<(Self, &'a str)> {
        let head = line.as_bytes().get(..ID)?;
        if !head
            .iter()
            .all(|&c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
        {
            return None;
        }
        // The first bytes are ASCII, so these are borders of characters.
        let (video_id, after) = line.split_at(ID);
        let (start, after) = digits(after.strip_prefix('_')?)?;
        let (end, after) = digits(after.strip_prefix('_')?)?;
        let rest = after.strip_prefix(ENDING)?;
        if rest.chars().next().is_some_and(|next| !next.is_whitespace()) {
            return None;
        }
        let text = &line[..line.len() - rest.len()];
        Some((
            Self {
                text,
                video_id,
                start,
                end,
            },
            rest,
        ))
    }

    /// The clip's id: its name without `.mp4`.
    #[must_use]
    pub fn id(&self) -> &'a str {
        &self.text[..self.text.len() - ENDING.len()]
    }

    /// Start and end in ms.
    ///
    /// # Errors
    /// The clip does not end after it starts, or a number is beyond all times.
    pub fn times(&self) -> Result<(u64, u64), Refusal> {
        let number = |digits: &str| {
            let number = digits.parse::<u64>().ok().filter(|ms| *ms <= LAST_MS);
            number.ok_or(Refusal::TimeTooLarge)
        };
        let (start, end) = (number(self.start)?, number(self.end)?);
        if end <= start {
            return Err(Refusal::EndNotAfterStart);
        }
        Ok((start, end))
    }
}

impl Refusal {
    /// The key under which it is counted.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EndNotAfterStart => "end_not_after_start",
            Self::TimeTooLarge => "time_too_large",
            Self::LineTooLong => "line_too_long",
        }
    }
}

/// The digits at the beginning, at least one, and the rest.
fn digits(text: &str) -> Option<(&str, &str)> {
    let count = text.bytes().take_while(u8::is_ascii_digit).count();
    (count > 0).then(|| text.split_at(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_example_is_a_clip_of_ten_seconds() {
        let (token, rest) = Token::leading("P2RPnCJZMBo_290000_300000.mp4").unwrap();
        assert_eq!(
            (token.video_id, token.id()),
            ("P2RPnCJZMBo", "P2RPnCJZMBo_290000_300000")
        );
        assert_eq!((token.times(), rest), (Ok((290_000, 300_000)), ""));
    }

    #[test]
    fn ids_may_hold_dashes_and_underscores_anywhere() {
        for id in ["-abcdefghij", "_1_2_3_4_5_", "___________", "a-b_c-d_e-f"] {
            let name = format!("{id}_30000_40000.mp4");
            let (token, _) = Token::leading(&name).unwrap();
            assert_eq!((token.video_id, token.times()), (id, Ok((30_000, 40_000))));
        }
    }

    #[test]
    fn other_words_are_no_names() {
        for text in [
            "",
            "P2RPnCJZMBo",
            "P2RPnCJZMB_290000_300000.mp4",
            "P2RPnCJZMBo__300000.mp4",
            "P2RPnCJZMBo_290000_.mp4",
            "P2RPnCJZMBo_290000_300000.MP4",
            "P2RPnCJZMBo_290000_300000.mp4.mp4",
            "P2RPnCJZMBo_290000_300000.mkv",
            "P2RPnCJZMBo_-1_300000.mp4",
            "P2RPnCJZMBo_+1_300000.mp4",
            "P2RPnCJZMB\u{e9}_290000_300000.mp4",
            "P2RPnCJZM\u{fffd}o_290000_300000.mp4",
            "P2RPnCJZMBo_\u{663}_300000.mp4",
            "xP2RPnCJZMBo_290000_300000.mp4",
        ] {
            assert!(Token::leading(text).is_none(), "{text}");
        }
    }

    #[test]
    fn times_that_are_none_are_told_apart() {
        let times = |times: &str| {
            let name = format!("P2RPnCJZMBo_{times}.mp4");
            let (token, _) = Token::leading(&name).unwrap();
            token.times()
        };
        assert_eq!(times("5_5"), Err(Refusal::EndNotAfterStart));
        assert_eq!(times("6_5"), Err(Refusal::EndNotAfterStart));
        assert_eq!(times("0_99999999999999999999999"), Err(Refusal::TimeTooLarge));
        assert_eq!(times("0_9007199254740992"), Err(Refusal::TimeTooLarge));
        assert_eq!(times("0_9007199254740991"), Ok((0, LAST_MS)));
        assert_eq!(
            times("0000000000000000000000000000_0000000000000000000000000001"),
            Ok((0, 1))
        );
    }

    #[test]
    fn a_name_ends_at_any_white_space() {
        for space in [" ", "\t", "\r", "\u{a0}", "\u{3000}"] {
            let line = format!("P2RPnCJZMBo_0_1.mp4{space}A bell.");
            let (token, rest) = Token::leading(&line).unwrap();
            assert_eq!((token.text, rest.trim()), ("P2RPnCJZMBo_0_1.mp4", "A bell."));
        }
    }
}
