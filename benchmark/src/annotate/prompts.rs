//! What models are asked, in versions: a text that was asked for with another version is another text.

use super::stage::Modality;

/// Version of [`rewrite`].
pub const REWRITE: &str = "rewrite-v1";
/// Version of [`merge`].
pub const MERGE: &str = "merge-v1";
/// Version of [`FRAMES_TEXT`].
pub const FRAMES: &str = "frames-v1";
/// Version of [`AUDIO_TEXT`].
pub const AUDIO: &str = "audio-v1";

/// What is asked about frames.
pub const FRAMES_TEXT: &str = "These are frames of one short clip, in order. Describe what is seen in one or two sentences: \
    who or what, what happens, and where. Do not mention frames, images or videos. Answer with the description only.";
/// What is asked about a sound.
pub const AUDIO_TEXT: &str = "Describe what is heard in this short clip in one or two sentences: which sounds, what makes \
    them, and how they change. Do not mention recordings or clips. Answer with the description only.";

/// Asks for better words.
#[must_use]
pub fn rewrite(text: &str, kind: Modality) -> String {
    format!(
        "Rewrite this machine-made caption of the {} content of a short clip as fluent English. Keep every stated fact, add \
         none, at most two sentences. Caption: {text}",
        kind.name()
    )
}

/// Asks for one description of both.
#[must_use]
pub fn merge(video: &str, audio: &str) -> String {
    format!(
        "Combine a visual description and a sound description of the same clip into one description of two or three \
         sentences, about fifty words. Mention who or what makes each sound when the two agree; do not contradict either; do \
         not mention captions, videos or recordings. Visual: {video} Sound: {audio}. Answer with the description only."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_hold_what_they_are_about() {
        let asked = rewrite("a dog barks", Modality::Audio);
        assert!(asked.contains("of the audio content") && asked.ends_with("Caption: a dog barks"));
        let asked = merge("A dog runs", "A dog barks");
        assert!(
            asked.contains("Visual: A dog runs Sound: A dog barks. Answer"),
            "{asked}"
        );
        assert!(!FRAMES_TEXT.contains("  ") && !AUDIO_TEXT.contains("  "));
    }
}
