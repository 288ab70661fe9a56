//! Text out of HTML and reStructuredText.

/// Tags that end a paragraph.
const BLOCKS: [&str; 18] = [
    "p",
    "div",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "ul",
    "ol",
    "tr",
    "table",
    "blockquote",
    "br",
    "hr",
    "dt",
    "dd",
];
/// Elements whose content is no text.
const HIDDEN: [&str; 4] = ["script", "style", "head", "title"];

/// The text of an HTML page: tags removed, entities decoded, runs of white space one blank, a paragraph a line, lines apart by an
/// empty one.
pub fn html(page: &str) -> String {
    let mut text = String::new();
    let mut rest = page;
    let mut hidden: Option<String> = None;
    while let Some(at) = rest.find('<') {
        if hidden.is_none() {
            decode(&rest[..at], &mut text);
        }
        let tag = &rest[at + 1..];
        if let Some(comment) = tag.strip_prefix("!--") {
            rest = comment.find("-->").map_or("", |end| &comment[end + 3..]);
            continue;
        }
        let closing = tag.strip_prefix('/');
        let named = closing.unwrap_or(tag);
        if !named.starts_with(|c: char| c.is_ascii_alphabetic() || c == '!' || c == '?') {
            // A sign for "less", as sloppy pages have it.
            if hidden.is_none() {
                text.push('<');
            }
            rest = tag;
            continue;
        }
        let length = named
            .find(|c: char| !c.is_ascii_alphanumeric())
            .unwrap_or(named.len());
        let name = named[..length].to_ascii_lowercase();
        match &hidden {
            Some(element) if closing.is_some() && *element == name => hidden = None,
            None if closing.is_none() && HIDDEN.contains(&name.as_str()) => hidden = Some(name.clone()),
            _ => {}
        }
        if hidden.is_none() && BLOCKS.contains(&name.as_str()) {
            text.push('\u{1}');
        }
        rest = tag.find('>').map_or("", |end| &tag[end + 1..]);
    }
    if hidden.is_none() {
        decode(rest, &mut text);
    }
    let paragraphs = text.split('\u{1}').map(joined).filter(|line| !line.is_empty());
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// Words with one blank between them.
pub fn joined(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn decode(mut text: &str, out: &mut String) {
    while let Some(at) = text.find('&') {
        out.push_str(&text[..at]);
        let entity = &text[at + 1..];
        let end = entity.bytes().take(10).position(|c| c == b';');
        let decoded = end.and_then(|end| character(&entity[..end]).map(|c| (c, end)));
        match decoded {
            Some((c, end)) => {
                out.push(c);
                text = &entity[end + 1..];
            }
            None => {
                out.push('&');
                text = entity;
            }
        }
    }
    out.push_str(text);
}

fn character(entity: &str) -> Option<char> {
    if let Some(number) = entity.strip_prefix('#') {
        let code = match number.strip_prefix(['x', 'X']) {
            Some(digits) => u32::from_str_radix(digits, 16).ok()?,
            None => number.parse().ok()?,
        };
        return char::from_u32(code).filter(|c| !c.is_control() || c.is_whitespace());
    }
    Some(match entity {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        "nbsp" => ' ',
        "mdash" => '\u{2014}',
        "ndash" => '\u{2013}',
        "hellip" => '\u{2026}',
        "lsquo" => '\u{2018}',
        "rsquo" => '\u{2019}',
        "ldquo" => '\u{201c}',
        "rdquo" => '\u{201d}',
        "eacute" => '\u{e9}',
        "egrave" => '\u{e8}',
        "ouml" => '\u{f6}',
        "uuml" => '\u{fc}',
        "ccedil" => '\u{e7}',
        "pound" => '\u{a3}',
        "copy" => '\u{a9}',
        _ => return None,
    })
}

/// The text of a reStructuredText file: without comments, directives and their options, lines that only draw, and marks of
/// roles and emphasis. What a directive holds stays, code too.
pub fn rst(source: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut comment: Option<usize> = None;
    let mut options = false;
    for line in source.lines() {
        let body = line.trim_start();
        let indent = line.len() - body.len();
        if let Some(outer) = comment {
            if body.is_empty() || indent > outer {
                continue;
            }
            comment = None;
        }
        if options && indent > 0 && body.starts_with(':') {
            continue;
        }
        options = false;
        if body == ".." || body.starts_with(".. ") {
            let directive = body.contains("::");
            // A target such as `.. _name:` is one line, a comment has all that is indented below it.
            (options, comment) = (directive, (!directive).then_some(indent));
            continue;
        }
        let draws = body.len() >= 3 && body.chars().all(|c| "=-~^\"'`*+#_:.|<> ".contains(c));
        if draws || body.starts_with(":orphan:") {
            continue;
        }
        let cell = body.trim_matches('|').trim_end();
        let text = inline(if body.starts_with('|') {
            cell.trim_start()
        } else {
            cell
        });
        let text = match text.strip_suffix("::") {
            Some("") => continue,
            Some(text) => format!("{text}:"),
            None => text,
        };
        if text.is_empty() && lines.last().is_none_or(String::is_empty) {
            continue;
        }
        lines.push(match text.is_empty() {
            true => text,
            false => format!("{}{text}", &line[..indent]),
        });
    }
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n")
}

/// A line without marks: `` :role:`x` ``, ``` ``x`` ```, `` `x <target>`_ ``, `**x**`, `*x*`.
fn inline(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(['`', '*']) {
        let (before, marked) = rest.split_at(at);
        let mark = ["``", "`", "**", "*"]
            .into_iter()
            .find(|mark| marked.starts_with(mark))
            .unwrap_or("`");
        let inner = &marked[mark.len()..];
        // A mark touches what it marks: others are signs of a product or a list.
        let end = inner
            .find(mark)
            .filter(|&end| end > 0 && !inner.starts_with(' ') && !inner[..end].ends_with(' '));
        let Some(end) = end else {
            out.push_str(before);
            out.push_str(mark);
            rest = inner;
            continue;
        };
        out.push_str(if mark == "`" { without_role(before) } else { before });
        let content = &inner[..end];
        rest = &inner[end + mark.len()..];
        if mark == "`" {
            let words = content.split(" <").next().unwrap_or(content);
            out.push_str(words.trim_start_matches(['!', '~']));
            rest = rest.trim_start_matches('_');
        } else {
            out.push_str(content);
        }
    }
    out.push_str(rest);
    out
}

/// What stands before `:role:` or `:domain:role:`.
fn without_role(before: &str) -> &str {
    if !before.ends_with(':') {
        return before;
    }
    let role = |c: char| c.is_ascii_alphanumeric() || ":-_+".contains(c);
    let start = before
        .char_indices()
        .rev()
        .take_while(|&(_, c)| role(c))
        .last()
        .map_or(before.len(), |(at, _)| at);
    match before[start..].find(':') {
        Some(colon) if before.len() - start - colon > 2 => &before[..start + colon],
        _ => before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_paragraphs() {
        let page = "<!DOCTYPE html><head><title>no</title><style>p < a {}</style></head><body><!-- <p>no</p> -->\
                    <h1>A &amp; B</h1>\n<p>one\n <i>two</i>&#8217;s &lt;x&gt; a < b &unknown; &#xe9;</p><P class='x'>three</body>";
        assert_eq!(
            html(page),
            "A & B\n\none two\u{2019}s <x> a < b &unknown; \u{e9}\n\nthree"
        );
        for odd in [
            "<",
            "a <b",
            "<!--",
            "&",
            "&#1;",
            "<script>x",
            "&#xffffffff;",
            "</",
        ] {
            html(odd);
        }
    }

    #[test]
    fn marks_of_restructured_text_go() {
        let source = ".. SPDX: x\n.. _target:\n\n=====\nTitle\n=====\n\n.. a comment\n   of two lines\n\nUse :command:`sdist` and ``x * y`` or\n\
                      `the page <http://x>`_, **very** *much*; 2 * 3 * 4::\n\n   code(*args)\n\n.. note:: \n   :name: x\n\n   Kept.\n\n\
                      +---+---+\n| a | b |\n+---+---+\n";
        assert_eq!(
            rst(source),
            "Title\n\nUse sdist and x * y or\nthe page, very much; 2 * 3 * 4:\n\n   code(*args)\n\n   Kept.\n\na | b"
        );
        for odd in ["`", "*", ":`x`", "``", "::", "..", "***", ":a:`"] {
            rst(odd);
        }
    }
}
