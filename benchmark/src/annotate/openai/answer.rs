//! What a server answers.

use serde_json::Value;

use super::super::texts::collapsed;

/// Characters of a foreign text that an error repeats.
const SHOWN: usize = 160;

/// A text, and the tokens of question and answer where the server tells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) tokens: Option<u64>,
}

/// Reads the body of a successful answer: `choices[0].message.content`, cleaned.
pub(super) fn read(body: &str) -> Result<Answer, String> {
    let value: Value =
        serde_json::from_str(body).map_err(|_| format!("no JSON in the answer: {}", short(body)))?;
    let choice = value
        .get("choices")
        .and_then(Value::as_array)
        .and_then(|choices| choices.first());
    let Some(choice) = choice else {
        return Err(match message(&value) {
            Some(message) => format!("no choices in the answer: {message}"),
            None => "no choices in the answer".to_owned(),
        });
    };
    let content = choice.get("message").and_then(|message| message.get("content"));
    let text = match content {
        Some(Value::String(text)) => text.clone(),
        // Some servers answer in parts.
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            texts.collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    };
    let text = tidy(&text);
    if text.is_empty() {
        return Err("an empty answer".to_owned());
    }
    let tokens = value
        .get("usage")
        .and_then(|usage| usage.get("total_tokens")?.as_u64());
    Ok(Answer { text, tokens })
}

/// What a server says about an error.
pub(super) fn complaint(body: &str) -> String {
    let value: Option<Value> = serde_json::from_str(body).ok();
    value.as_ref().and_then(message).unwrap_or_else(|| short(body))
}

fn message(value: &Value) -> Option<String> {
    let error = value.get("error")?;
    let text = error
        .get("message")
        .and_then(Value::as_str)
        .or_else(|| error.as_str())?;
    Some(short(text))
}

/// The beginning of a text, on one line.
pub(super) fn short(text: &str) -> String {
    let line = collapsed(&text.replace(char::is_control, " "));
    let mut short: String = line.chars().take(SHOWN).collect();
    if line.chars().nth(SHOWN).is_some() {
        short.push_str("...");
    }
    short
}

/// A text without the fences of code, the quotes around it, and the ends of its lines.
fn tidy(text: &str) -> String {
    let mut text = text.trim();
    if let Some(inside) = text.strip_prefix("```") {
        let inside = inside.strip_suffix("```").unwrap_or(inside);
        // The first line of a fence may name a language.
        text = match inside.split_once('\n') {
            Some((first, rest)) if !first.trim().contains(' ') => rest,
            _ => inside,
        };
    }
    let mut text = collapsed(text);
    for (open, close) in [('"', '"'), ('\'', '\''), ('\u{201c}', '\u{201d}'), ('`', '`')] {
        let inside = text.strip_prefix(open).and_then(|text| text.strip_suffix(close));
        if let Some(inside) = inside.filter(|inside| !inside.contains([open, close])) {
            text = inside.trim().to_owned();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(content: &str) -> String {
        serde_json::json!({
            "choices": [{ "message": { "role": "assistant", "content": content } }],
            "usage": { "total_tokens": 31 },
        })
        .to_string()
    }

    #[test]
    fn answers_are_cleaned() {
        for (content, text) in [
            ("A dog barks.", "A dog barks."),
            ("  \"A dog\n barks.\"  ", "A dog barks."),
            ("```\nA dog barks.\n```", "A dog barks."),
            ("```text\n\"A dog barks.\"\n```", "A dog barks."),
            ("```A dog barks.```", "A dog barks."),
            ("\u{201c}A dog barks.\u{201d}", "A dog barks."),
            ("\"Go\", she says, \"now.\"", "\"Go\", she says, \"now.\""),
            ("'tis a dog's bark", "'tis a dog's bark"),
        ] {
            let answer = read(&body(content)).unwrap();
            assert_eq!(
                (answer.text.as_str(), answer.tokens),
                (text, Some(31)),
                "{content}"
            );
        }
        let parts = r#"{"choices":[{"message":{"content":[{"type":"text","text":"A dog"},{"type":"text","text":"barks."}]}}]}"#;
        assert_eq!(
            read(parts).unwrap(),
            Answer {
                text: "A dog barks.".into(),
                tokens: None
            }
        );
    }

    #[test]
    fn answers_that_are_none_are_told() {
        for (body, words) in [
            (
                "<html>\n<p>busy</p></html>",
                "no JSON in the answer: <html> <p>busy</p></html>",
            ),
            ("{}", "no choices in the answer"),
            (r#"{"choices":[]}"#, "no choices in the answer"),
            (
                r#"{"error":{"message":"no such model"}}"#,
                "no choices in the answer: no such model",
            ),
            (r#"{"choices":[{}]}"#, "an empty answer"),
            (r#"{"choices":[{"message":{"content":null}}]}"#, "an empty answer"),
            (
                r#"{"choices":[{"message":{"content":" \"\" "}}]}"#,
                "an empty answer",
            ),
            (r#"{"choices":{"a":1}}"#, "no choices in the answer"),
            ("5", "no choices in the answer"),
        ] {
            assert_eq!(read(body).unwrap_err(), words);
        }
        let long = "x".repeat(10_000);
        assert!(read(&long).unwrap_err().len() < 250 && complaint(&long).len() < 200);
        assert_eq!(complaint(r#"{"error":"busy"}"#), "busy");
    }
}
