//! Words and sentences of a caption, counted by rules that give the same figures everywhere.

/// Words: pieces between white space.
///
/// ```
/// assert_eq!(fulgur_benchmark::captions::words("A dog's bark -  loud."), 5);
/// ```
#[must_use]
pub fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// Sentences: runs of text that end with one or more of `.`, `!` and `?` before white space or the end. Text behind the
/// last of them is none.
///
/// ```
/// use fulgur_benchmark::captions::sentences;
/// assert_eq!(sentences("A dog barks at 3.5 m. Who hears it?! Nobody"), 2);
/// ```
#[must_use]
pub fn sentences(text: &str) -> usize {
    let ends = |c: char| matches!(c, '.' | '!' | '?');
    let mut count = 0;
    // Whether the run has any text so far, and whether the character before ended it.
    let (mut text_before, mut ended) = (false, false);
    for c in text.chars() {
        if c.is_whitespace() {
            if ended {
                count += 1;
                text_before = false;
            }
            ended = false;
        } else if ends(c) {
            ended = text_before;
        } else {
            text_before = true;
            ended = false;
        }
    }
    count + usize::from(ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_with_a_stop_before_space() {
        for (text, count) in [
            ("", 0),
            ("A dog barks", 0),
            ("A dog barks.", 1),
            ("A dog barks. A bell rings.", 2),
            ("A dog barks... A bell rings", 1),
            ("What?! Really? Yes!", 3),
            ("Version 1.5 of example.org is out. ", 1),
            ("He says \"no.\" and leaves.", 1),
            (". . .", 0),
            ("One.\nTwo.\tThree.\u{a0}Four.", 4),
        ] {
            assert_eq!(sentences(text), count, "{text}");
        }
    }

    #[test]
    fn words_are_pieces_between_space() {
        assert_eq!(words("  two\u{3000}words \n"), 2);
        assert_eq!(words(" \t"), 0);
    }
}
