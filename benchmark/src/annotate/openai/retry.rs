//! When a request is tried again, and after which pause.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fulgur_kernels::philox::Philox;

/// Longest pause that a server may ask for.
const MOST: Duration = Duration::from_secs(3600);

/// Whether an answer of this status may be another one later.
pub(super) fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 409 | 429 | 500..=599)
}

/// The pause after try `tried` (from 1): `first`, doubled with each try, at most `most`; of that a random part between a half
/// and all of it, so that those who failed together do not come back together.
pub(super) fn pause(tried: u32, first: Duration, most: Duration, question: u64) -> Duration {
    let doubled = first.as_secs_f64() * 2f64.powi(tried.saturating_sub(1).min(40) as i32);
    let part = Philox::new(question, u64::from(tried)).range(0.5, 1.0);
    Duration::from_secs_f64(doubled.min(most.as_secs_f64()) * f64::from(part))
}

/// What a server asks for in `Retry-After`: seconds, or a date such as `Wed, 21 Oct 2015 07:28:00 GMT`. None where it asks for
/// nothing that can be read, an error where it asks for too much.
pub(super) fn asked(header: &str, now: SystemTime) -> Option<Result<Duration, String>> {
    let header = header.trim();
    let seconds = match header.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() => seconds.max(0.0),
        _ => {
            let since = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
            (date(header)? as f64 - since).max(0.0)
        }
    };
    if seconds > MOST.as_secs_f64() {
        return Some(Err(format!("the server asks for a pause of {seconds:.0} s")));
    }
    Some(Ok(Duration::from_secs_f64(seconds)))
}

/// Seconds since 1970 of a date in the form of HTTP.
fn date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, rest) = text.split_once(", ")?;
    let mut words = rest.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|known| *known == name)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if words.next()? != "GMT"
        || !(1970..10_000).contains(&year)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
    {
        return None;
    }
    // Days since 1970 of the Gregorian calendar; years begin in March, so that the odd day comes last.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_vary() {
        let (first, most) = (Duration::from_secs(1), Duration::from_secs(10));
        for (tried, full) in [(1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (60, 10.0)] {
            let pauses: Vec<f64> = (0..50)
                .map(|question| pause(tried, first, most, question).as_secs_f64())
                .collect();
            assert!(
                pauses.iter().all(|pause| (full / 2.0..=full).contains(pause)),
                "{pauses:?}"
            );
            let spread =
                pauses.iter().fold(0f64, |a, b| a.max(*b)) - pauses.iter().fold(99f64, |a, b| a.min(*b));
            assert!(spread > full / 4.0, "{pauses:?}");
        }
        assert_eq!(pause(3, first, most, 7), pause(3, first, most, 7));
    }

    #[test]
    fn servers_ask_in_seconds_or_dates() {
        // date -u -d "Wed, 21 Oct 2015 07:28:00 GMT" +%s
        assert_eq!(date("Wed, 21 Oct 2015 07:28:00 GMT"), Some(1_445_412_480));
        assert_eq!(date("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199));
        assert_eq!(date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        let now = UNIX_EPOCH + Duration::from_secs(1_445_412_470);
        let seconds = |header: &str| asked(header, now).map(|pause| pause.map(|pause| pause.as_secs_f64()));
        assert_eq!(seconds("3"), Some(Ok(3.0)));
        assert_eq!(seconds(" 0.25 "), Some(Ok(0.25)));
        assert_eq!(seconds("-4"), Some(Ok(0.0)));
        assert_eq!(seconds("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Ok(10.0)));
        assert_eq!(seconds("Wed, 21 Oct 2014 07:28:00 GMT"), Some(Ok(0.0)));
        assert!(seconds("86400").unwrap().unwrap_err().contains("86400 s"));
        for none in [
            "",
            "soon",
            "NaN",
            "inf",
            "Wed, 21 Oct 2015",
            "Wed, 99 Oct 2015 07:28:00 GMT",
            "x, 1 Jan 1970 1:1:1 CET",
        ] {
            assert_eq!(seconds(none), None, "{none}");
        }
    }

    #[test]
    fn some_statuses_may_pass() {
        for status in [408, 409, 429, 500, 502, 503, 599] {
            assert!(may_pass(status));
        }
        for status in [200, 301, 400, 401, 403, 404, 422, 600] {
            assert!(!may_pass(status));
        }
    }
}
