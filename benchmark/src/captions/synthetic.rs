//! Caption files made by rule: of the size and the oddities of the release, for trials without it.
//!
//! Who makes a file knows what is in it: [`Made`] counts while writing, so that readers can be checked against it.

use std::io::{self, Write};

use fulgur_kernels::philox::Philox;

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Clips that are to be kept.
    pub records: u64,
    /// Those with a caption.
    pub captions: u64,
    /// Names that came before.
    pub duplicates: u64,
    /// Lines that belong to no clip.
    pub ignored_lines: u64,
    /// Clips that end before they start.
    pub rejected: u64,
    /// Captions below their names.
    pub two_line: u64,
    /// Lines of broken UTF-8.
    pub broken_utf8: u64,
    /// Lengths together, in ms.
    pub length_ms: u64,
    /// Words of all captions.
    pub words: u64,
    /// Sentences of all captions.
    pub sentences: u64,
}

const THINGS: [&str; 16] = [
    "a brown dog",
    "an old man",
    "two children",
    "the crowd",
    "a red train",
    "a woman in a blue coat",
    "several birds",
    "a drummer",
    "a motorboat",
    "the wind",
    "a church bell",
    "a cat",
    "rain",
    "a small engine",
    "a violinist",
    "waves",
];
const DEEDS: [&str; 12] = [
    "barks at",
    "runs past",
    "sings beside",
    "rattles behind",
    "is heard over",
    "plays in front of",
    "splashes near",
    "rings above",
    "hums along with",
    "moves slowly towards",
    "echoes across",
    "laughs with",
];
const PLACES: [&str; 10] = [
    "a wooden fence",
    "the crowded station",
    "a quiet lake",
    "a narrow street",
    "the stage",
    "a snowy field",
    "the kitchen table",
    "a stone bridge",
    "an open window",
    "the playground",
];

/// Writes a caption file of `records` clips that are to be kept, about a hundredth of them odd in one way or another.
/// Captions have 2.3 sentences and 50 words on average, as those of the release.
///
/// # Errors
/// The disk refuses.
pub fn write_captions(out: &mut impl Write, records: u64, seed: u64) -> io::Result<Made> {
    let mut made = Made::default();
    let mut before = None;
    // Whether the record before still waits for its caption: any line of text would be it.
    let mut waiting = false;
    while made.records < records {
        let mut draw = Philox::new(seed, made.records);
        let (name, length_ms) = clip(made.records, &mut draw);
        let text = caption(&mut draw);
        match draw.below(1000) {
            0 => {
                writeln!(out, "{} {text}", reversed(&name))?;
                made.rejected += 1;
            }
            1 if !waiting => {
                writeln!(out, "no clip, but a line of text: {text}")?;
                made.ignored_lines += 1;
            }
            2 => {
                writeln!(out)?;
                made.ignored_lines += 1;
            }
            _ => {}
        }
        if let Some(name) = before.take().filter(|_| draw.chance(0.002)) {
            writeln!(out, "{name}\n{text}")?;
            made.duplicates += 1;
        }
        waiting = false;
        made.records += 1;
        made.length_ms += length_ms;
        match draw.below(500) {
            0 => {
                out.write_all(format!("{name}\n{}_5_5.mp4\n", &name[..11]).as_bytes())?;
                made.rejected += 1;
                (before, waiting) = (Some(name), true);
                continue;
            }
            1 => {
                writeln!(out, "{name}\n{text}")?;
                made.two_line += 1;
            }
            2 => {
                out.write_all(format!("{name} {text} caf").as_bytes())?;
                out.write_all(b"\xe9.\n")?;
                made.broken_utf8 += 1;
                made.words += 1;
                made.sentences += 1;
            }
            _ => writeln!(out, "{name} {text}")?,
        }
        made.captions += 1;
        made.words += text.split(' ').count() as u64;
        made.sentences += text.matches('.').count() as u64;
        before = Some(name);
    }
    Ok(made)
}

/// Writes a manifest of clips that have been seen and heard, but not yet described as a whole: `caption_video` and
/// `caption_audio` are there, a few of them poor.
///
/// # Errors
/// The disk refuses.
pub fn write_manifest(out: &mut impl Write, records: u64, seed: u64) -> io::Result<()> {
    for i in 0..records {
        let mut draw = Philox::new(seed, i);
        let (name, _) = clip(i, &mut draw);
        let id = name.trim_end_matches(".mp4");
        let (seen, heard) = match draw.below(100) {
            0 => (
                "I'm sorry, I cannot help with that.".to_owned(),
                sentence(&mut draw),
            ),
            1 => ("see www.example.org for more".to_owned(), sentence(&mut draw)),
            2 => (
                "\u{43a}\u{43e}\u{442} \u{441}\u{43f}\u{438}\u{442}".to_owned(),
                "\u{43c}\u{443}\u{440}".to_owned(),
            ),
            3 => (sentence(&mut draw), String::new()),
            _ => (sentence(&mut draw), sentence(&mut draw)),
        };
        let line = serde_json::json!({
            "id": id, "caption_video": seen, "caption_audio": heard, "number": i,
        });
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Name and length of a clip; three clips of a video, and names that differ.
fn clip(number: u64, draw: &mut Philox) -> (String, u64) {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut code = (number / 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut id = String::with_capacity(48);
    for _ in 0..11 {
        id.push(char::from(LETTERS[(code & 63) as usize]));
        code = code.rotate_right(6);
    }
    let start = number % 3 * 1_000_000 + 1000 * draw.below(600) as u64;
    let length = 1000
        * if draw.chance(0.8) {
            10
        } else {
            2 + draw.below(28) as u64
        };
    (format!("{id}_{start}_{}.mp4", start + length), length)
}

/// The name of a clip that ends where it starts.
fn reversed(name: &str) -> String {
    let start = name[12..].split('_').next().unwrap_or("0");
    format!("{}_{start}_{start}.mp4", &name[..11])
}

fn caption(draw: &mut Philox) -> String {
    let count = 1 + draw.below(3) + usize::from(draw.chance(0.3));
    let sentences: Vec<String> = (0..count).map(|_| format!("{}.", sentence(draw))).collect();
    sentences.join(" ")
}

/// About 21 words.
fn sentence(draw: &mut Philox) -> String {
    let parts: Vec<String> = (0..3)
        .map(|_| {
            let thing = THINGS[draw.below(THINGS.len())];
            let deed = DEEDS[draw.below(DEEDS.len())];
            format!("{thing} {deed} {}", PLACES[draw.below(PLACES.len())])
        })
        .collect();
    parts.join(" while ")
}

#[cfg(test)]
mod tests {
    use super::super::Captions;
    use super::super::statistics::Statistics;
    use super::*;

    #[test]
    fn a_reader_counts_what_was_written() {
        for seed in 0..3 {
            let mut text = Vec::new();
            let made = write_captions(&mut text, 20_000, seed).unwrap();
            assert!(
                made.rejected > 20
                    && made.ignored_lines > 10
                    && made.duplicates > 10
                    && made.broken_utf8 > 10
            );
            let mut captions = Captions::new("made", text.as_slice());
            let mut statistics = Statistics::default();
            while let Some(record) = captions.next_clip().unwrap() {
                statistics.add(&record);
            }
            let counts = captions.counts();
            let read = Made {
                records: counts.records,
                captions: counts.captions,
                duplicates: counts.duplicates,
                ignored_lines: counts.ignored_lines,
                rejected: counts.rejected,
                two_line: counts.two_line,
                broken_utf8: counts.broken_utf8,
                length_ms: statistics.lengths.sum() as u64,
                words: statistics.words.sum() as u64,
                sentences: statistics.sentences.sum() as u64,
            };
            assert_eq!(read, made);
        }
    }
}
