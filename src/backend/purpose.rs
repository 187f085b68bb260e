//! The purpose of a model, as its server states it. Servers use different fields and words: LM Studio's `type`, Ollama's
//! `capabilities`, GPUStack's `categories`, Xinference's `model_type`, Lemonade's `labels`, Hugging Face's `task`, OpenRouter's
//! `output_modalities`, LiteLLM's `mode`.

use serde_json::Value;

/// The fields that state purposes.
pub const PURPOSE_FIELDS: [&str; 14] = [
    "type",
    "task",
    "tasks",
    "supported_tasks",
    "pipeline_tag",
    "mode",
    "model_type",
    "model_ability",
    "capabilities",
    "category",
    "categories",
    "labels",
    "output_modalities",
    "architecture",
];

/// Words for the purposes of models that can chat; compared as a whole.
const CHAT: [&str; 15] = [
    "llm",
    "vlm",
    "text",
    "language",
    "code",
    "generate",
    "generation",
    "text-generation",
    "text2text-generation",
    "text-to-text",
    "image-text-to-text",
    "audio-text-to-text",
    "video-text-to-text",
    "any-to-any",
    "conversational",
];
/// Parts of further words for these purposes, or for abilities that only such models have.
const CHAT_PARTS: [&str; 6] = ["chat", "completion", "tool", "function-call", "reasoning", "thinking"];

/// Parts of the words for other purposes.
const OTHER_PARTS: [&str; 17] = [
    "embed",
    "rerank",
    "feature-extraction",
    "similarity",
    "classif",
    "scor",
    "pooling",
    "reward",
    "moderat",
    "transcri",
    "speech",
    "whisper",
    "audio",
    "image",
    "video",
    "upscale",
    "inpaint",
];

/// Abbreviations of other purposes, which occur in unrelated words too.
const OTHER_ABBREVIATIONS: [&str; 3] = ["stt", "tts", "asr"];

/// The first purpose that the fields state, if none of the stated purposes is chat.
pub fn other_than_chat(fields: &Value) -> Option<String> {
    let mut words = Vec::new();
    for name in PURPOSE_FIELDS {
        match name {
            "architecture" => collect(&fields[name]["output_modalities"], &mut words),
            _ => collect(&fields[name], &mut words),
        }
    }
    let words: Vec<String> = words.into_iter().map(|word| word.to_lowercase().replace(['_', ' '], "-")).collect();
    let has_any = |word: &str, parts: &[&str]| parts.iter().any(|part| word.contains(part));
    if words.iter().any(|word| CHAT.contains(&word.as_str()) || has_any(word, &CHAT_PARTS)) {
        return None;
    }
    let is_other = |word: &String| {
        let is_abbreviation = |part| OTHER_ABBREVIATIONS.contains(&part);
        // What a model reads says nothing about its purpose.
        !word.contains("input") && (has_any(word, &OTHER_PARTS) || word.split('-').any(is_abbreviation))
    };
    words.into_iter().find(is_other)
}

/// The purposes in a value: a word, a list of words, or an object whose keys are purposes with true or whose `type` is one.
fn collect<'a>(value: &'a Value, words: &mut Vec<&'a str>) {
    match value {
        Value::String(word) => words.push(word),
        Value::Array(list) => words.extend(list.iter().filter_map(Value::as_str)),
        Value::Object(map) => {
            words.extend(map.iter().filter(|(_, value)| **value == true).map(|(key, _)| key.as_str()));
            words.extend(map.get("type").and_then(Value::as_str));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn purpose_is_read_from_the_fields_of_many_servers() {
        for (fields, purpose) in [
            (json!({"type": "embeddings"}), Some("embeddings")),
            (json!({"type": "vlm", "capabilities": ["tool_use"]}), None),
            (json!({"capabilities": ["embedding"]}), Some("embedding")),
            (json!({"capabilities": ["completion", "vision", "embedding"]}), None),
            (json!({"capabilities": {"completion_chat": true, "classification": true}}), None),
            (json!({"capabilities": {"type": "embeddings", "family": "text-embedding-3"}}), Some("embeddings")),
            (json!({"categories": ["text_to_speech"]}), Some("text-to-speech")),
            (json!({"model_type": "LLM"}), None),
            (json!({"model_type": "rerank"}), Some("rerank")),
            (json!({"labels": ["vision", "tool-calling", "reasoning"]}), None),
            (json!({"task": "automatic-speech-recognition"}), Some("automatic-speech-recognition")),
            (json!({"architecture": {"input_modalities": ["image"], "output_modalities": ["text", "image"]}}), None),
            (json!({"architecture": {"input_modalities": ["text"], "output_modalities": ["image"]}}), Some("image")),
            (json!({"type": "tts"}), Some("tts")),
            (json!({"labels": ["kokoro", "realtime-tts"]}), Some("realtime-tts")),
            (json!({"labels": ["fasttext", "megawatts"]}), None),
            (json!({"capabilities": ["vision", "audio", "tools"]}), None),
            (json!({"capabilities": {"image_input": true, "audio_input": true, "function_calling": true}}), None),
            (json!({"capabilities": {"image_input": true}}), None),
            (json!({"mode": "audio_transcription"}), Some("audio-transcription")),
            (json!({"type": "model", "task": null, "capabilities": 7, "labels": [1, {}]}), None),
            (json!({}), None),
        ] {
            assert_eq!(other_than_chat(&fields).as_deref(), purpose, "{fields}");
        }
    }
}
