// A small hand for 01_shapes: the eight shapes in their eight colours, drawn on a canvas.
export const SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond"];
export const COLORS = { red: "220,40,40", green: "40,170,60", blue: "45,80,220", yellow: "240,210,40", purple: "140,50,180", orange: "245,140,30", cyan: "60,200,220", white: "245,245,245" };
export const BACKGROUNDS = { black: "15,15,18", gray: "110,110,110", navy: "20,25,70", brown: "90,55,30" };
const EXTENT = { small: 0.27, large: 0.42 };

/** The outline of a shape of width 2 around the origin, y down. */
function outline(c, shape) {
  const poly = points => points.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
  if (shape === "circle" || shape === "ring") c.arc(0, 0, 1, 0, 7);
  if (shape === "ring") { c.closePath(); c.moveTo(0.55, 0); c.arc(0, 0, 0.55, 0, 2 * Math.PI, true); }
  if (shape === "square") c.rect(-0.85, -0.85, 1.7, 1.7);
  if (shape === "triangle") poly([[0, -0.9], [1, 0.83], [-1, 0.83]]);
  if (shape === "diamond") poly([[0, -1], [0.75, 0], [0, 1], [-0.75, 0]]);
  if (shape === "cross") poly([[-.33, -1], [.33, -1], [.33, -.33], [1, -.33], [1, .33], [.33, .33], [.33, 1], [-.33, 1], [-.33, .33], [-1, .33], [-1, -.33], [-.33, -.33]]);
  if (shape === "star") poly(Array.from({ length: 10 }, (_, i) => { const r = i % 2 ? 0.45 : 1.05, a = Math.PI * (i / 5 - 0.5); return [r * Math.cos(a), 0.08 + r * Math.sin(a)]; }));
  if (shape === "heart") { c.moveTo(0, 0.95); c.bezierCurveTo(-1.5, -0.1, -0.9, -1.15, 0, -0.5); c.bezierCurveTo(0.9, -1.15, 1.5, -0.1, 0, 0.95); }
  c.closePath();
}

/** Draw a scene: {background, objects: [{shape, color, size, x, y}]}, places in fractions of the picture. */
export function draw_scene(canvas, scene) {
  const c = canvas.getContext("2d"), s = canvas.width;
  c.fillStyle = `rgb(${BACKGROUNDS[scene.background]})`;
  c.fillRect(0, 0, s, s);
  for (const o of scene.objects) {
    c.save();
    c.translate(o.x * s, o.y * s);
    c.scale(EXTENT[o.size] * s / 2, EXTENT[o.size] * s / 2);
    c.fillStyle = `rgb(${COLORS[o.color]})`;
    c.beginPath();
    outline(c, o.shape);
    c.fill();
    c.restore();
  }
}

/** A scene as a short text for a link, and back; null for what is none. */
export const write_scene = s => [s.background, ...s.objects.map(o => [o.color, o.shape, o.size, Math.round(100 * o.x), Math.round(100 * o.y)].join("."))].join("~");
export function read_scene(text) {
  const [background, ...rest] = (text ?? "").split("~");
  const objects = rest.map(t => t.split(".")).map(([color, shape, size, x, y]) => ({ color, shape, size, x: x / 100, y: y / 100 }));
  const fine = background in BACKGROUNDS && objects.length <= 3 && objects.every(o => o.color in COLORS && SHAPES.includes(o.shape) && o.size in EXTENT && o.x >= 0 && o.x <= 1 && o.y >= 0 && o.y <= 1);
  return fine ? { background, objects } : null;
}
