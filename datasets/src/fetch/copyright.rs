//! Debian's machine-readable copyright files: which licence a file of a package has.
//!
//! A paragraph `Files: PATTERNS` with `Copyright:` and `License:` holds for the paths that match one of its patterns;
//! of several paragraphs the last one wins. `*` matches any characters, slashes too, `?` exactly one.

/// The terms of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Short name of the licence, such as `GPL-3+`.
    pub licence: String,
    /// Holders, joined by semicolons.
    pub holders: String,
}

/// All paragraphs of a copyright file.
#[derive(Clone, Debug, Default)]
pub struct Copyrights(Vec<(Vec<String>, Terms)>);

impl Copyrights {
    /// Reads the text; paragraphs without `Files` or `License` say nothing about a file and are passed over.
    pub fn parse(text: &str) -> Self {
        let mut all = Vec::new();
        for paragraph in text.split("\n\n") {
            let field = |name: &str| field(paragraph, name);
            let (Some(files), Some(licence)) = (field("Files"), field("License")) else {
                continue;
            };
            let patterns = files.iter().flat_map(|line| line.split_whitespace());
            let terms = Terms {
                licence: licence[0].to_owned(),
                holders: field("Copyright").unwrap_or_default().join("; "),
            };
            all.push((patterns.map(str::to_owned).collect(), terms));
        }
        Self(all)
    }

    /// The terms of a file, which may be named in several ways: the last paragraph that matches one of `names`.
    pub fn of(&self, names: &[&str]) -> Option<&Terms> {
        let matching = |patterns: &[String]| {
            let any = |pattern: &String| {
                names
                    .iter()
                    .any(|name| matches(pattern.as_bytes(), name.as_bytes()))
            };
            patterns.iter().any(any)
        };
        let last = self.0.iter().rev().find(|(patterns, _)| matching(patterns));
        last.map(|(_, terms)| terms)
    }
}

/// The lines of a field, its continuation lines included; at least one, perhaps empty.
fn field<'a>(paragraph: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let mut lines = paragraph.lines();
    let first = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let rest = lines.take_while(|line| line.starts_with([' ', '\t']));
    Some(std::iter::once(first).chain(rest).map(str::trim).collect())
}

fn matches(pattern: &[u8], path: &[u8]) -> bool {
    // Greedy with one point of return: linear in the path for every star.
    let (mut p, mut s, mut star) = (0, 0, None);
    while s < path.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, s));
                p += 1;
            }
            Some(&c) if c == b'?' || c == path[s] => {
                p += 1;
                s += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    s = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_matching_paragraph_wins() {
        let text = "Format: x\n\nFiles: *\nCopyright: 2010 A\n           2011 B\nLicense: GPL-3+\n\n\
                    Files: img/*.svg\n       snd/?.ogg\nCopyright: C\nLicense: CC0-1.0\nComment: y\n\n\
                    License: GPL-3+\n text of the licence\n";
        let all = Copyrights::parse(text);
        let of = |path| {
            let terms = all.of(&[path]).unwrap();
            (terms.licence.as_str(), terms.holders.as_str())
        };
        assert_eq!(of("img/deep/a.svg"), ("CC0-1.0", "C"));
        assert_eq!(of("snd/a.ogg"), ("CC0-1.0", "C"));
        assert_eq!(of("snd/ab.ogg"), ("GPL-3+", "2010 A; 2011 B"));
        assert_eq!(of("img/a.png"), ("GPL-3+", "2010 A; 2011 B"));
        let renamed = all.of(&["snd/a.wav", "snd/a.ogg"]).unwrap();
        assert_eq!(renamed.licence, "CC0-1.0");
        assert_eq!(Copyrights::parse("").of(&["a"]), None);
    }

    #[test]
    fn stars_match_across_and_at_the_ends() {
        assert!(matches(b"a*c*", b"abcbcd"));
        assert!(matches(b"*", b""));
        assert!(!matches(b"a*c", b"abcd"));
        assert!(!matches(b"", b"a"));
    }
}
