// Reading back the settings that the server writes into a PNG: an iTXt chunk with the keyword "stepfuse".

const MOST_TEXT = 2 ** 20; // bytes: settings are a few hundred, and deflated ones could be of any size
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The JSON text in the iTXt chunk of a keyword, or null; an Error for a file that is not a PNG. */
export async function readText(bytes, keyword = "stepfuse") {
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) throw new Error("it is not a PNG");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (type === "iTXt") {
      const text = await international(data, keyword);
      if (text !== null) return text;
    }
    if (type === "IEND") break;
    at += 12 + length;
  }
  return null;
}

/** keyword, 0, whether compressed, method, language, 0, translated keyword, 0, text (PNG, third edition, 11.3.3.4). */
async function international(data, keyword) {
  const end = data.indexOf(0);
  if (new TextDecoder("latin1").decode(data.subarray(0, end)) !== keyword) return null;
  const compressed = data[end + 1] === 1;
  const language = data.indexOf(0, end + 3);
  const text = data.subarray(data.indexOf(0, language + 1) + 1);
  if (!compressed && text.length > MOST_TEXT) throw tooLong();
  if (!compressed) return new TextDecoder().decode(text);
  return inflated(text);
}

async function inflated(text) {
  const reader = new Blob([text]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let length = 0; ; ) {
    const { value, done } = await reader.read().catch(() => {
      throw new Error("its settings cannot be inflated");
    });
    if (done) return new Blob(parts).text();
    length += value.length;
    if (length > MOST_TEXT) {
      reader.cancel();
      throw tooLong();
    }
    parts.push(value);
  }
}

function tooLong() {
  return new Error("its settings are longer than 1 MiB");
}
