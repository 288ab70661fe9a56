//! The fields of a JSON object as they were written, so that what is not understood survives letter by letter.

use serde::de::IgnoredAny;

use super::error::Wrong;

/// Names and values of an object's fields, in their order; values are the text that stands in the file.
pub(crate) fn fields(text: &str) -> Result<Vec<(String, &str)>, Wrong> {
    let text = text.trim();
    let expected = "a JSON object";
    serde_json::from_str::<IgnoredAny>(text)
        .map_err(|error| Wrong::new("line", error.to_string(), expected))?;
    if !text.starts_with('{') {
        return Err(Wrong::new("line", text, expected));
    }
    // From here on the text is an object: only where its parts begin and end is left to find.
    let mut fields: Vec<(String, &str)> = Vec::new();
    let mut rest = text[1..].trim_start();
    while !rest.starts_with('}') {
        let (name, after) = rest.split_at(string_end(rest));
        let name: String = serde_json::from_str(name.trim_end())
            .map_err(|error| Wrong::new("line", error.to_string(), expected))?;
        let value = after.trim_start().trim_start_matches(':').trim_start();
        let (value, after) = value.split_at(value_end(value));
        if fields.iter().any(|(known, _)| *known == name) {
            return Err(Wrong::new(&name, "the field twice", "it once"));
        }
        fields.push((name, value.trim_end()));
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    Ok(fields)
}

/// Where the string at the beginning ends.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Where the value at the beginning ends: before the comma or bracket that is not its own.
fn value_end(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                at += string_end(&text[at..]);
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 0 => return at,
            b'}' | b']' => depth -= 1,
            b',' if depth == 0 => return at,
            _ => {}
        }
        at += 1;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_the_text_of_the_file() {
        let text = r#" { "a":1.50 , "b \"q\"" : {"x":[1,"}],",{}]} ,"c":"\u00e9\\", "d" :[ ] ,"e":null,"f":-1e-7 } "#;
        let fields = fields(text).unwrap();
        let expected = [
            ("a", "1.50"),
            ("b \"q\"", r#"{"x":[1,"}],",{}]}"#),
            ("c", r#""\u00e9\\""#),
            ("d", "[ ]"),
            ("e", "null"),
            ("f", "-1e-7"),
        ];
        assert_eq!(fields.len(), expected.len());
        for ((name, value), (expected_name, expected_value)) in fields.iter().zip(expected) {
            assert_eq!((name.as_str(), *value), (expected_name, expected_value));
        }
        assert!(super::fields("{}").unwrap().is_empty());
        assert!(super::fields("{ }").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in [
            "",
            "5",
            "[1]",
            "{",
            "{\"a\":1}}",
            "{\"a\" 1}",
            "{a:1}",
            "{\"a\":NaN}",
            "\"x\"",
        ] {
            assert_eq!(fields(text).unwrap_err().field, "line", "{text}");
        }
        let twice = fields(r#"{"a":1,"b":2,"\u0061":3}"#).unwrap_err();
        assert_eq!(
            (twice.field.as_str(), twice.found.as_str()),
            ("a", "the field twice")
        );
        // Depth is no danger to the stack.
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
        if let Ok(fields) = fields(&deep) {
            assert_eq!(fields[0].1.len(), 400_000);
        }
    }
}
