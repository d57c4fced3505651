// 02_data's byte-level BPE: normalise, cut into words, join pairs of pieces in the order in which they were learned.

/** The printable character that stands for each byte (GPT-2's table). */
function byte_letters() {
  const table = new Map();
  let extra = 0;
  for (let b = 0; b < 256; b++) {
    const plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    table.set(b, String.fromCodePoint(plain ? b : 256 + extra++));
  }
  return table;
}

export class Tokenizer {
  constructor(json) {
    this.vocab = json.model.vocab;
    this.ranks = new Map(json.model.merges.map((m, i) => [Array.isArray(m) ? m.join(" ") : m, i]));
    this.length = json.truncation.max_length;
    const marks = Object.fromEntries(json.added_tokens.map(t => [t.content, t.id]));
    this.start = marks["<start>"];
    this.end = marks["<end>"];
    this.letters = byte_letters();
  }

  /** The pieces of one word: join the pair that was learned first, again and again. */
  pieces(word) {
    const parts = [...word];
    for (;;) {
      let best = -1, rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const r = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (r !== undefined && r < rank) { best = i; rank = r; }
      }
      if (best < 0) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  /** A caption as `length` ids: start, the caption, end, then 0. A long caption is cut and keeps its end. */
  encode(caption) {
    const text = " " + caption.normalize("NFKC").toLowerCase().replace(/\s+/gu, " ").trim();
    const words = text.match(/'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu) ?? [];
    const bytes = new TextEncoder(), ids = [];
    for (const w of words) {
      const letters = Array.from(bytes.encode(w), b => this.letters.get(b)).join("");
      for (const piece of this.pieces(letters)) ids.push(this.vocab[piece]);
    }
    const row = [this.start, ...ids.slice(0, this.length - 2), this.end];
    while (row.length < this.length) row.push(0);
    return row;
  }
}
