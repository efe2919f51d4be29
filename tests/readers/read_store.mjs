// Reads a store with zarrita and decodes it by FORMAT.md 4: node read_store.mjs KV_ZARR LAYER...
// Prints one JSON object: input_ids, and for every layer key and value, as base64 of little-endian int32 and float32 numbers
// over the whole token axis.
import FileSystemStore from "@zarrita/storage/fs";
import * as zarr from "zarrita";

const [path, ...layers] = process.argv.slice(2);
const root = await zarr.open(new FileSystemStore(path), { kind: "group" });

async function read(group, name, slot) {
  const array = await zarr.open(group.resolve(name), { kind: "array" });
  return zarr.get(array, array.shape.map((_, axis) => (axis === 0 && slot !== undefined ? slot : null)));
}

function e4m3(code) {
  const exponent = (code >> 3) & 15;
  const mantissa = code & 7;
  const magnitude = exponent > 0 ? (1 + mantissa / 8) * 2 ** (exponent - 7) : mantissa * 2 ** -9;
  return code < 128 ? magnitude : -magnitude;
}

// One number for every stored code, before step and mean.
function unpack(codes, packed) {
  const { data, shape } = codes;
  if (packed) {
    const half = shape[2];
    return Float32Array.from({ length: 2 * data.length }, (_, index) => {
      const column = index % (2 * half);
      const byte = data[Math.floor(index / (2 * half)) * half + (column % half)];
      return (column < half ? byte & 15 : byte >> 4) - 8;
    });
  }
  if (data instanceof Uint16Array) return new Float32Array(Uint32Array.from(data, (bits) => bits << 16).buffer);
  return Float32Array.from(data, data instanceof Uint8Array ? e4m3 : undefined);
}

async function decode(group, kind, slot) {
  const quantised = group.attrs.kvpipe.codec !== "raw";
  const packed = group.attrs.kvpipe.decode[kind].includes(`${kind}_byte`);
  const values = unpack(await read(group, packed ? `${kind}_byte` : kind, slot), packed);
  if (!quantised) return values;
  const mean = (await read(group, `${kind}_mean`, slot)).data;
  const step = (await read(group, `${kind}_step`, slot)).data;
  return values.map((value, index) => Math.fround(value * step[index % step.length]) + mean[index % mean.length]);
}

const base64 = (numbers) => Buffer.from(numbers.buffer, numbers.byteOffset, numbers.byteLength).toString("base64");
const output = { input_ids: base64((await read(root, "input_ids")).data), layers: {} };
for (const layer of layers) {
  const [groupPath, slot] = root.attrs.kvpipe.groups[layer];
  const group = groupPath ? await zarr.open(root.resolve(groupPath), { kind: "group" }) : root;
  output.layers[layer] = {
    key: base64(await decode(group, "key", slot)),
    value: base64(await decode(group, "value", slot)),
  };
}
console.log(JSON.stringify(output));
