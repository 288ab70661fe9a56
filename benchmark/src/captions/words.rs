//! Words and sentences of a caption, counted by rules that give the same figures everywhere.

/// Words: pieces between white space.
///
/// ```
/// assert_eq!(fulgur_benchmark::captions::words("A dog's bark -  loud."), 5);
/// ```
#[must_use]
pub fn words(text: &str) -> usize {
    if !text.is_ascii() {
        return text.split_whitespace().count();
    }
    // The same, three times as fast: tab, line feed, vertical tab, form feed, carriage return and space are white.
    let white = |c: u8| matches!(c, b'\t'..=b'\r' | b' ');
    let (count, _) = text.bytes().fold((0, true), |(count, before), c| {
        (count + usize::from(before && !white(c)), white(c))
    });
    count
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
    let ends = |c: &u8| matches!(c, b'.' | b'!' | b'?');
    let bytes = text.as_bytes();
    // Where the sentence begins, and from where on its end is looked for.
    let (mut count, mut start, mut at) = (0, 0, 0);
    while let Some(found) = bytes[at..].iter().position(ends) {
        let first = at + found;
        // Marks are ASCII, so all of these are borders of characters.
        at = first + bytes[first..].iter().take_while(|c| ends(c)).count();
        let closed = text[at..].chars().next().is_none_or(char::is_whitespace);
        let is_text = |c: char| !c.is_whitespace() && !matches!(c, '.' | '!' | '?');
        if closed && text[start..first].chars().any(is_text) {
            count += 1;
            start = at;
        }
    }
    count
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
        for text in [
            "one",
            " one\ttwo\x0bthree\x0cfour\r\nfive\x1csix ",
            "\x00 \x7f",
            "",
        ] {
            assert_eq!(words(text), text.split_whitespace().count(), "{text:?}");
        }
    }
}
