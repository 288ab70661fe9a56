//! Searches for likely texts, token by token: greedily, or with several at a time.
//!
//! Reference: `generate` of Hugging Face transformers with `do_sample=False` and `early_stopping=False`.
//!
//! ```text
//! beams = 1   the likeliest token, until it is the end
//! beams = k   of all continuations of k texts the 2 k likeliest; the best k that do not end go on. Those of the first k that end are
//!             worth sum(log p) / tokens^penalty, and the best k of them are kept. It is over where k ended and the best that goes
//!             on is worth less now than the worst of them.
//! ```

use candle_core::Result;

/// How a text is searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Tokens that are written, at most, the end included.
    pub most: usize,
    /// Texts at a time; 1 is the greedy search.
    pub beams: usize,
    /// Power of the length that sums of log-probabilities are divided by: above 0 favours long texts.
    pub length_penalty: f64,
}

/// A text that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its tokens, without the prompt and the end.
    pub tokens: Vec<u32>,
    /// Whether it came to its end: there was room enough, and nobody stopped it.
    pub ended: bool,
}

/// What gives scores of next tokens.
pub trait Scores {
    /// Scores of every token behind the prompt.
    ///
    /// # Errors
    /// Arithmetic that fails.
    fn first(&mut self) -> Result<Vec<f32>>;

    /// Scores behind the texts of rows `parents` of the call before, each with one token more.
    ///
    /// # Errors
    /// Arithmetic that fails.
    fn next(&mut self, parents: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>>;
}

/// The likeliest text that ends with `end`.
///
/// # Errors
/// Scores that cannot be had.
pub fn search(
    scores: &mut impl Scores,
    end: u32,
    options: &Options,
    go_on: &dyn Fn() -> bool,
) -> Result<Found> {
    match options.beams {
        0 | 1 => greedy(scores, end, options.most, go_on),
        _ => beams(scores, end, options, go_on),
    }
}

fn greedy(scores: &mut impl Scores, end: u32, most: usize, go_on: &dyn Fn() -> bool) -> Result<Found> {
    let mut tokens = Vec::new();
    let mut row = scores.first()?;
    while tokens.len() < most && go_on() {
        let token = likeliest(&row);
        if token == end {
            return Ok(Found { tokens, ended: true });
        }
        tokens.push(token);
        if tokens.len() < most {
            row = scores.next(&[0], &[token])?.swap_remove(0);
        }
    }
    Ok(Found { tokens, ended: false })
}

fn likeliest(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, score) in row.iter().enumerate() {
        if *score > row[best] {
            best = i;
        }
    }
    best as u32
}

/// A text and the sum of its log-probabilities.
#[derive(Clone, Debug)]
struct Beam {
    tokens: Vec<u32>,
    sum: f32,
}

/// A continuation of a text.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    parent: usize,
    token: u32,
    sum: f32,
}

fn beams(scores: &mut impl Scores, end: u32, options: &Options, go_on: &dyn Fn() -> bool) -> Result<Found> {
    let Options {
        most,
        beams,
        length_penalty,
    } = *options;
    let mut running = vec![Beam {
        tokens: Vec::new(),
        sum: 0.0,
    }];
    // What each is worth, the best first.
    let mut ended: Vec<(Beam, f32)> = Vec::new();
    let mut rows = vec![scores.first()?];
    for length in 1..=most {
        if !go_on() {
            break;
        }
        let last = length == most;
        let divisor = (length as f64).powf(length_penalty) as f32;
        let candidates = best_candidates(&rows, &running, 2 * beams);
        for candidate in candidates.iter().take(beams) {
            if candidate.token == end || last {
                let mut beam = running[candidate.parent].clone();
                beam.tokens.push(candidate.token);
                ended.push((beam, candidate.sum / divisor));
            }
        }
        // A stable sort: of equals the earlier one is kept.
        ended.sort_by(|a, b| b.1.total_cmp(&a.1));
        ended.truncate(beams);
        if last {
            break;
        }
        let onward: Vec<Candidate> = candidates
            .into_iter()
            .filter(|candidate| candidate.token != end)
            .take(beams)
            .collect();
        let Some(best) = onward.first() else { break };
        let worst = ended.last().map_or(f32::NEG_INFINITY, |(_, worth)| *worth);
        if ended.len() == beams && best.sum / divisor <= worst {
            break;
        }
        running = onward
            .iter()
            .map(|candidate| {
                let mut tokens = running[candidate.parent].tokens.clone();
                tokens.push(candidate.token);
                Beam {
                    tokens,
                    sum: candidate.sum,
                }
            })
            .collect();
        let parents: Vec<usize> = onward.iter().map(|candidate| candidate.parent).collect();
        let tokens: Vec<u32> = onward.iter().map(|candidate| candidate.token).collect();
        rows = scores.next(&parents, &tokens)?;
    }
    let mut best = match ended.into_iter().next() {
        Some((beam, _)) => beam,
        None => running.swap_remove(0),
    };
    let stopped = best.tokens.last() == Some(&end);
    if stopped {
        best.tokens.pop();
    }
    Ok(Found {
        tokens: best.tokens,
        ended: stopped,
    })
}

/// The likeliest continuations of all texts, the best first; of equals the earlier one.
fn best_candidates(rows: &[Vec<f32>], running: &[Beam], count: usize) -> Vec<Candidate> {
    let mut all = Vec::new();
    for (parent, (row, beam)) in rows.iter().zip(running).enumerate() {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total = row.iter().map(|score| (score - most).exp()).sum::<f32>().ln();
        all.extend(row.iter().enumerate().map(|(token, score)| Candidate {
            parent,
            token: token as u32,
            sum: beam.sum + (score - most - total),
        }));
    }
    let count = count.min(all.len());
    let order = |a: &Candidate, b: &Candidate| {
        b.sum
            .total_cmp(&a.sum)
            .then(a.parent.cmp(&b.parent))
            .then(a.token.cmp(&b.token))
    };
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        all.truncate(count);
    }
    all.sort_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores that depend on the token before alone: log-probabilities of a table.
    struct Table<'a> {
        rows: &'a [[f32; 4]],
        begin: usize,
    }

    impl Scores for Table<'_> {
        fn first(&mut self) -> Result<Vec<f32>> {
            Ok(self.rows[self.begin].iter().map(|p| p.ln()).collect())
        }

        fn next(&mut self, _: &[usize], tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
            let row = |token: &u32| self.rows[*token as usize].iter().map(|p| p.ln()).collect();
            Ok(tokens.iter().map(row).collect())
        }
    }

    const END: u32 = 3;
    /// The likeliest first token, 1, leads to unlikely texts; 0, the second, to a likely one.
    const ROWS: [[f32; 4]; 3] = [
        [0.02, 0.02, 0.02, 0.94],
        [0.30, 0.30, 0.20, 0.20],
        [0.40, 0.55, 0.03, 0.02],
    ];

    fn find(beams: usize, most: usize, length_penalty: f64) -> (Vec<u32>, bool) {
        let mut table = Table {
            rows: &ROWS,
            begin: 2,
        };
        let options = Options {
            most,
            beams,
            length_penalty,
        };
        let found = search(&mut table, END, &options, &|| true).unwrap();
        (found.tokens, found.ended)
    }

    #[test]
    fn several_texts_find_what_the_likeliest_token_misses() {
        assert_eq!(find(1, 2, 1.0), (vec![1, 0], false));
        assert_eq!(find(1, 9, 1.0), (vec![1, 0], true));
        // 0 and the end: 0.4 * 0.94, better than any other text, token for token or not.
        for beams in [2, 3, 7] {
            for penalty in [0.0, 1.0] {
                assert_eq!(find(beams, 9, penalty), (vec![0], true), "{beams} {penalty}");
            }
        }
        assert_eq!(find(3, 1, 1.0), (vec![1], false));
    }

    #[test]
    fn whoever_stops_gets_what_there_is() {
        let mut table = Table {
            rows: &ROWS,
            begin: 2,
        };
        for beams in [1, 3] {
            let options = Options {
                most: 9,
                beams,
                length_penalty: 1.0,
            };
            let found = search(&mut table, END, &options, &|| false).unwrap();
            assert_eq!((found.tokens, found.ended), (vec![], false));
        }
    }
}
