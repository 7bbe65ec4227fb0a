"use strict";
// A confusion matrix of up to 1,000 classes at the resolution of the screen. Zoomed out, a cell is a block of classes
// and shows the strongest of them; zoomed in, each class has its own cell, then its name, then its count.

const MAX_CELLS = 250; // in a row
const MAX_NAMES = 40; // along an axis
const logLike = (share) => Math.log1p(99 * share) / Math.log(100); // 1% at 0.15, 10% at 0.5

function readMatrix(meta) {
  const size = meta.names.length;
  const counts = Uint32Array.from(atob(meta.counts), (letter) => letter.charCodeAt(0));
  for (const [index, count] of Object.entries(meta.large)) counts[index] = count;
  const sums = Float64Array.from(meta.support); // images of each class
  const original = Array.from({ length: size }, (_, index) => index);
  return { size, counts, sums, names: meta.names, orders: { original, clustered: meta.order || original }, annotated: meta.annotated };
}

function visible(range, size) {
  const low = Math.max(0, Math.ceil(Math.min(...range) - 0.5 + 1e-6));
  const high = Math.min(size - 1, Math.floor(Math.max(...range) + 0.5 - 1e-6));
  return [low, Math.max(low, high)];
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shortened = (text, most) => escaped(text.length > most ? text.slice(0, most - 1) + "\u2026" : text);

// The strongest cell of a block as [row, column], or null if all are empty.
function strongest(matrix, order, top, left, block) {
  let best = null, most = 0;
  for (let y = top; y < Math.min(top + block, matrix.size); y++) {
    for (let x = left; x < Math.min(left + block, matrix.size); x++) {
      const share = matrix.counts[order[y] * matrix.size + order[x]] / (matrix.sums[order[y]] || 1);
      if (share > most) { most = share; best = [y, x]; }
    }
  }
  return best;
}

function describeCell(matrix, truth, predicted) {
  const count = matrix.counts[truth * matrix.size + predicted], sum = matrix.sums[truth];
  return `truth <b>${shortened(matrix.names[truth], 60)}</b><br>predicted <b>${shortened(matrix.names[predicted], 60)}</b>` +
    `<br>${count.toLocaleString("en")} of ${sum.toLocaleString("en")} images (${(100 * count / (sum || 1)).toFixed(1)}%)`;
}

function matrixTrace(matrix, order, xs, ys, narrow) {
  const block = Math.max(1, Math.ceil(Math.max(xs[1] - xs[0], ys[1] - ys[0], 1) / MAX_CELLS));
  const starts = ([low, high]) => {
    const indices = [];
    for (let index = low - (low % block); index <= high; index += block) indices.push(index);
    return indices;
  };
  const columns = starts(xs), rows = starts(ys), z = [], text = [], hovertext = [];
  for (const top of rows) {
    const values = [], counts = [], descriptions = [];
    for (const left of columns) {
      const best = strongest(matrix, order, top, left, block);
      if (!best) {
        values.push(null);
        counts.push("");
        descriptions.push(block > 1 ? "" : describeCell(matrix, order[top], order[left]));
        continue;
      }
      const truth = order[best[0]], predicted = order[best[1]], count = matrix.counts[truth * matrix.size + predicted];
      const shade = logLike(count / matrix.sums[truth]);
      values.push(truth === predicted ? shade : -shade);
      counts.push(count.toLocaleString("en"));
      descriptions.push((block > 1 ? `strongest of ${block} \u00d7 ${block} cells:<br>` : "") + describeCell(matrix, truth, predicted));
    }
    z.push(values); text.push(counts); hovertext.push(descriptions);
  }
  const shift = (block - 1) / 2, few = Math.max(columns.length, rows.length) <= matrix.annotated && block === 1;
  return {
    type: "heatmap", z, text, hovertext, x0: columns[0] + shift, dx: block, y0: rows[0] + shift, dy: block,
    zmin: -1, zmax: 1, colorscale: "theme:rightAndWrong", hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: block === 1,
    xgap: few ? 1 : 0, ygap: few ? 1 : 0, ...(few ? { texttemplate: "%{text}" } : {}),
    colorbar: {
      orientation: "h", y: -0.02, yanchor: "top", thickness: 10, len: 0.7, outlinewidth: 0,
      ...scaleMarks(narrow), tickangle: 0, title: { text: narrow ? "wrong \u2190 \u2192 right" : "wrong \u2190 share of the class's images \u2192 right", side: "bottom" },
    },
  };
}

function scaleMarks(narrow) {
  const marks = narrow ? [0.1, 1] : [0.01, 0.1, 0.3, 1], labels = marks.map((mark) => `${100 * mark}%`);
  return {
    tickvals: [...marks.map((mark) => -logLike(mark)).reverse(), 0, ...marks.map(logLike)],
    ticktext: [...labels.slice().reverse(), "0", ...labels],
  };
}

function matrixAxis(matrix, order, [low, high]) {
  const every = Math.max(1, Math.ceil((high - low + 1) / MAX_NAMES)), indices = [];
  if (every > 1) return { showticklabels: false, tickvals: [], ticktext: [] };
  for (let index = low; index <= high; index++) indices.push(index);
  return { showticklabels: true, tickvals: indices, ticktext: indices.map((index) => shortened(matrix.names[order[index]], 20)) };
}

// The figure of the part in `ranges`; of the whole matrix if null.
function matrixFigure(matrix, orderName, ranges, width) {
  const order = matrix.orders[orderName], whole = [-0.5, matrix.size - 0.5];
  const [rx, ry] = ranges || [whole, [whole[1], whole[0]]];
  const xs = visible(rx, matrix.size), ys = visible(ry, matrix.size);
  const narrow = width < 480, longest = Math.min(20, Math.max(...matrix.names.map((name) => name.length)));
  const turned = 7 * longest > (0.7 * width) / (xs[1] - xs[0] + 1);
  const axis = { showgrid: false, zeroline: false, ticks: "", automargin: true, showline: true, mirror: true };
  return {
    data: [matrixTrace(matrix, order, xs, ys, narrow)],
    layout: {
      xaxis: { ...axis, ...matrixAxis(matrix, order, xs), range: rx, side: "top", title: { text: narrow ? "" : "predicted", standoff: 8 }, tickangle: turned ? -45 : 0 },
      yaxis: { ...axis, ...matrixAxis(matrix, order, ys), range: ry, title: { text: "truth", standoff: 8 } },
      hovermode: "closest", margin: { t: 40, r: 10, b: 70, l: 40 },
    },
  };
}
