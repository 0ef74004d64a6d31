// Finds the commands in a sentence of the coordinator, so that they can be copied. Pure.

/**
 * Return parts {text} and {command} in order.
 *
 * A command stands between backticks, or is a line of its own that begins with one of
 * our two programs.
 */
export function splitCommands(sentence) {
  const parts = [];
  const pattern = /`([^`]+)`|^[ \t]*((?:bitnet-coordinator|bitnet-worker)\b.*)$/gm;
  let from = 0;
  for (const match of sentence.matchAll(pattern)) {
    addText(parts, sentence.slice(from, match.index));
    parts.push({ command: (match[1] ?? match[2]).trim() });
    from = match.index + match[0].length;
  }
  addText(parts, sentence.slice(from));
  return parts;
}

function addText(parts, text) {
  // A command that is taken out of its sentence leaves a comma or full stop behind.
  const trimmed = text.replace(/^[\s.,:;]+/, "").trim();
  if (trimmed) parts.push({ text: trimmed });
}
