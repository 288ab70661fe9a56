//! ListOps (arXiv 1804.06028) in the lengths of the Long Range Arena: nested lists of digits, and what they come to.
//!
//! ```text
//! [MAX 2 9 [MIN 4 7 ] 0 ]     9
//! ```
//!
//! MAX and MIN are what they are called, MED is the median, of an even number the mean of the middle two rounded down, SM the sum modulo 10. A
//! place is a list with probability 1/4, above the deepest level, and a digit otherwise; lists have any number of arguments from 2 up.
//! Expressions that are shorter or longer than asked for are drawn again.

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

/// Values of an expression.
pub const CLASSES: usize = 10;
/// Ids of tokens are below this; 0 is none of them.
pub const VOCABULARY: usize = 16;

/// Ids of the tokens, in this order from 1 on.
const NAMES: [&str; 15] = [
    "[MIN", "[MAX", "[MED", "[SM", "]", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9",
];
const END: u8 = 5;
const ZERO: u8 = 6;
/// A place is a list with a probability of one over this.
const DIGITS_FOR_A_LIST: usize = 4;
/// Expressions that are drawn for one of the right length.
const MOST_DRAWS: usize = 200_000;

/// Which expressions.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListOps {
    /// Fewest tokens.
    pub min_length: usize,
    /// Most tokens.
    pub max_length: usize,
    /// Lists and digits are nested at most this deep: 1 is a digit alone.
    pub max_depth: usize,
    /// Most arguments of a list.
    pub max_arguments: usize,
}

impl Default for ListOps {
    /// Those of the Long Range Arena.
    fn default() -> Self {
        Self {
            min_length: 500,
            max_length: 2000,
            max_depth: 10,
            max_arguments: 10,
        }
    }
}

/// Expressions that cannot be.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ListOpsError {
    /// A setting is out of its range.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Its name.
        field: &'static str,
        /// What was given.
        found: usize,
        /// What fits.
        expected: String,
    },
    /// There are too few expressions of these lengths.
    #[error(
        "no expression of {min} to {max} tokens among {MOST_DRAWS}, expected other lengths, depth or arguments"
    )]
    Rare {
        /// Fewest tokens.
        min: usize,
        /// Most tokens.
        max: usize,
    },
}

/// An expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// Ids of its tokens, 1 to 15.
    pub tokens: Vec<u8>,
    /// What it comes to, 0 to 9.
    pub value: u8,
}

impl ListOps {
    /// Refuses settings that no expression has.
    ///
    /// # Errors
    /// A setting is out of its range, or nearly no expression has these lengths.
    pub fn check(&self) -> Result<(), ListOpsError> {
        let longest = 1 << 20;
        let Self {
            min_length,
            max_length,
            max_depth,
            max_arguments,
        } = *self;
        for (field, found, least, most) in [
            ("max_length", max_length, 1, longest),
            ("min_length", min_length, 1, max_length),
            ("max_depth", max_depth, 1, 64),
            ("max_arguments", max_arguments, 2, 1000),
        ] {
            if found < least || found > most {
                return Err(ListOpsError::Setting {
                    field,
                    found,
                    expected: format!("{least} to {most}"),
                });
            }
        }
        self.example(0, 0).map(drop)
    }

    /// Expression number `index` of `seed`.
    ///
    /// # Errors
    /// There are too few expressions of these lengths.
    pub fn example(&self, seed: u64, index: u64) -> Result<Expression, ListOpsError> {
        let mut draw = Draw {
            options: *self,
            noise: Philox::named(seed, &format!("listops/{index}")),
            tokens: Vec::with_capacity(self.max_length),
            values: Vec::new(),
        };
        for _ in 0..MOST_DRAWS {
            draw.tokens.clear();
            draw.values.clear();
            if let Some(value) = draw.place(1)
                && draw.tokens.len() >= self.min_length
            {
                return Ok(Expression {
                    tokens: draw.tokens,
                    value,
                });
            }
        }
        Err(ListOpsError::Rare {
            min: self.min_length,
            max: self.max_length,
        })
    }
}

/// The words of `tokens`, with spaces between them; ids of none are left out.
pub fn text(tokens: &[u8]) -> String {
    let names = tokens
        .iter()
        .filter_map(|&id| NAMES.get(usize::from(id).wrapping_sub(1)));
    names.copied().collect::<Vec<_>>().join(" ")
}

/// An expression that is being drawn.
struct Draw {
    options: ListOps,
    noise: Philox,
    tokens: Vec<u8>,
    /// Arguments of all lists that are open.
    values: Vec<u8>,
}

impl Draw {
    /// Draws what stands at a place, and gives its value; none where the expression becomes too long.
    fn place(&mut self, depth: usize) -> Option<u8> {
        if self.tokens.len() >= self.options.max_length {
            return None;
        }
        let list = depth < self.options.max_depth && self.noise.below(DIGITS_FOR_A_LIST) == 0;
        if !list {
            let value = self.noise.below(CLASSES) as u8;
            self.tokens.push(ZERO + value);
            return Some(value);
        }
        let operator = self.noise.below(4) as u8;
        self.tokens.push(1 + operator);
        let count = 2 + self.noise.below(self.options.max_arguments - 1);
        let first = self.values.len();
        for _ in 0..count {
            let value = self.place(depth + 1)?;
            self.values.push(value);
        }
        if self.tokens.len() >= self.options.max_length {
            return None;
        }
        self.tokens.push(END);
        let value = apply(operator, &mut self.values[first..]);
        self.values.truncate(first);
        Some(value)
    }
}

/// What operator number `operator` makes of at least one argument; their order is lost.
fn apply(operator: u8, arguments: &mut [u8]) -> u8 {
    arguments.sort_unstable();
    let count = arguments.len();
    match operator {
        0 => arguments[0],
        1 => arguments[count - 1],
        2 => (arguments[(count - 1) / 2] + arguments[count / 2]) / 2,
        _ => (arguments.iter().map(|&value| usize::from(value)).sum::<usize>() % CLASSES) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a text by the definition of its operators, by recursion over its words.
    fn evaluate(words: &[&str]) -> f64 {
        let word = words[0];
        let Some(operator) = word.strip_prefix('[') else {
            assert_eq!(words.len(), 1, "words behind a digit");
            return word.parse().expect("a digit");
        };
        let mut arguments = Vec::new();
        let all = &words[1..];
        let mut at = 0;
        while all[at] != "]" {
            let length = extent(&all[at..]);
            arguments.push(evaluate(&all[at..at + length]));
            at += length;
        }
        assert_eq!(at, all.len() - 1, "words behind the end of a list");
        arguments.sort_by(f64::total_cmp);
        let count = arguments.len();
        assert!(count >= 2);
        match operator {
            "MAX" => arguments[count - 1],
            "MIN" => arguments[0],
            "MED" if count % 2 == 1 => arguments[count / 2],
            "MED" => f64::midpoint(arguments[count / 2 - 1], arguments[count / 2]).floor(),
            "SM" => arguments.iter().sum::<f64>().rem_euclid(10.0),
            other => panic!("operator {other}"),
        }
    }

    /// Words of the first value of `words`.
    fn extent(words: &[&str]) -> usize {
        let mut open = 0i32;
        for (at, word) in words.iter().enumerate() {
            open += i32::from(word.starts_with('[')) - i32::from(*word == "]");
            if open == 0 {
                return at + 1;
            }
        }
        panic!("a list without end")
    }

    fn value_of(text: &str) -> f64 {
        evaluate(&text.split(' ').collect::<Vec<_>>())
    }

    #[test]
    fn the_evaluator_of_these_tests_knows_the_operators() {
        assert_eq!(value_of("[MAX 2 9 [MIN 4 7 ] 0 ]"), 9.0);
        assert_eq!(value_of("[MED 1 8 2 ]"), 2.0);
        assert_eq!(value_of("[MED 1 8 2 5 ]"), 3.0);
        assert_eq!(value_of("[SM 9 9 [SM 3 4 ] ]"), 5.0);
    }

    #[test]
    fn values_are_those_of_the_text() {
        let short = ListOps {
            min_length: 4,
            max_length: 60,
            max_depth: 5,
            max_arguments: 6,
        };
        for (options, count) in [(ListOps::default(), 60), (short, 3000)] {
            for index in 0..count {
                let example = options.example(3, index).unwrap();
                let length = example.tokens.len();
                assert!(
                    (options.min_length..=options.max_length).contains(&length),
                    "{length}"
                );
                let text = text(&example.tokens);
                assert_eq!(text.split(' ').count(), length);
                assert_eq!(value_of(&text), f64::from(example.value), "{text}");
                assert!(deepest(&text) < options.max_depth);
            }
        }
    }

    fn deepest(text: &str) -> usize {
        let (mut open, mut most) = (0usize, 0);
        for word in text.split(' ') {
            if word.starts_with('[') {
                open += 1;
            } else if word == "]" {
                open -= 1;
            }
            most = most.max(open);
        }
        most
    }

    #[test]
    fn examples_are_functions_of_seed_and_index() {
        let options = ListOps::default();
        let one = options.example(1, 5).unwrap();
        assert_eq!(one, options.example(1, 5).unwrap());
        assert_ne!(one, options.example(1, 6).unwrap());
        assert_ne!(one, options.example(2, 5).unwrap());
    }

    /// No class is missing, and none is most of them: guessing the likeliest is far from right.
    #[test]
    fn every_class_is_there() {
        let options = ListOps::default();
        let mut counts = [0; CLASSES];
        for index in 0..600 {
            counts[usize::from(options.example(1, index).unwrap().value)] += 1;
        }
        assert!(counts.iter().all(|&count| count > 600 / 40), "{counts:?}");
        assert!(counts.iter().all(|&count| count < 600 / 4), "{counts:?}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let line = |change: fn(&mut ListOps)| {
            let mut options = ListOps::default();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(line(|o| o.min_length = 0).contains("min_length is 0, expected 1 to 2000"));
        assert!(line(|o| o.max_length = 400).contains("min_length is 500, expected 1 to 400"));
        assert!(line(|o| o.max_arguments = 1).contains("max_arguments is 1"));
        assert!(line(|o| o.max_depth = 2).contains("no expression of 500 to 2000 tokens"));
    }
}
